"""The trusted side, run on what an engine recorded: its model, scheduler and decoder."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from truestep.engines.conventions import Conversion, as_rank, text_as
from truestep.engines.engine import LATENTS, SOUND, TEXTS, TIMES
from truestep.engines.folders import refuse_code, still
from truestep.engines.run import Pass, Run
from truestep.errors import FOREIGN, ModelLoadError, UsageError, one_line

INDEX = "model_index.json"
_DENOISERS = ("transformer", "unet", "prior")
_SECOND = "transformer_2"


class Trusted:
    """A model folder of diffusers, of which each part is loaded when it is asked for.

    Args:
        folder: A pipeline's, or one model's.
        dtype: That the engine worked in.

    Raises:
        ModelLoadError: It is no such folder, or brings code of its own.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._index: Mapping[str, Any] = {}
        if (folder / INDEX).is_file():
            self._index = _read(folder / INDEX)
            refuse_code(folder / INDEX, self._index)
        elif not (folder / "config.json").is_file():
            raise ModelLoadError(
                "the trusted model is no folder of diffusers",
                where=str(folder),
                measured=f"neither {INDEX} nor config.json is in it",
                hint="truestep tiny WanPipeline ./tiny-wan  # makes a small one to try",
            )
        self._parts: dict[str, Any] = {}

    def part(self, name: str) -> Any:
        """A component, or None where the folder has none of that name."""
        if name not in self._parts:
            self._parts[name] = self._load(name)
        return self._parts[name]

    def denoiser(self, time: float | None) -> torch.nn.Module:
        """The model that predicts at a time; of two experts the one whose time it is.

        Raises:
            ModelLoadError: There is none.
        """
        if not self._index:
            return self.part("")  # type: ignore[no-any-return]
        name = self._expert(time)
        model = self.part(name) if name else None
        if model is None:
            raise ModelLoadError(
                "the trusted folder has no denoiser",
                where=str(self.folder),
                measured=f"looked for: {', '.join(_DENOISERS)}",
            )
        return model  # type: ignore[no-any-return]

    @property
    def boundary(self) -> float | None:
        """The time below which another expert predicts; None of a model with one."""
        ratio = self._index.get("boundary_ratio")
        return float(ratio) * 1000 if ratio and self._index.get(_SECOND) else None

    def _expert(self, time: float | None) -> str:
        late = self.boundary is not None and time is not None and time < self.boundary
        return _SECOND if late else next((n for n in _DENOISERS if self._index.get(n)), "")

    def other_expert(self, time: float) -> tuple[str, str, torch.nn.Module] | None:
        """Of two experts the one whose time it is, the other, and the other's model."""
        if self.boundary is None:
            return None
        right = self._expert(time)
        wrong = next(n for n in (*_DENOISERS, _SECOND) if self._index.get(n) and n != right)
        model = self.part(wrong)
        return None if model is None else (right, wrong, model)

    def config(self, name: str) -> Mapping[str, Any]:
        """Configuration of a component; empty where there is none."""
        file = self.folder / name / "config.json"
        return _read(file) if file.is_file() else {}

    def gives_sigmas(self) -> bool:
        """Whether its pipeline may make sigmas for its scheduler, which then makes none itself."""
        import diffusers

        pipeline = getattr(diffusers, str(self._index.get("_class_name", "")), None)
        if not isinstance(pipeline, type) or not callable(pipeline):
            return False
        return "sigmas" in inspect.signature(pipeline.__call__).parameters

    def scheduler_class(self) -> tuple[Any, Mapping[str, Any]] | None:
        """Class and settings of its scheduler."""
        entry = self._index.get("scheduler")
        if not isinstance(entry, list) or entry[:1] != ["diffusers"]:
            return None
        path = self.folder / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            return None
        import diffusers

        return getattr(diffusers, str(entry[1]), None), _read(path)

    def _load(self, name: str) -> Any:
        import diffusers

        place = self.folder / name if name else self.folder
        file = place / "config.json"
        if not file.is_file():
            return None
        kind = str(_read(file).get("_class_name", ""))
        cls = getattr(diffusers, kind, None)
        if cls is None or not hasattr(cls, "from_pretrained"):
            raise ModelLoadError(
                f"diffusers has no model class {kind!r}", where=str(file), hint="truestep doctor"
            )
        try:
            with still("diffusers"):
                model = cls.from_pretrained(str(place), torch_dtype=self.dtype)
        except FOREIGN as error:
            raise ModelLoadError(
                "the trusted model cannot be loaded", where=str(place), measured=one_line(error)
            ) from None
        return model.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            "a file of the trusted model cannot be read", where=str(path), measured=one_line(error)
        ) from None
    if not isinstance(content, dict):
        raise ModelLoadError("a file of the trusted model cannot be read", where=str(path))
    return content


LATENT, SIGMA = "latent of the step", "sigma of the step"
"""What a denoiser is given beside its model's arguments, for predictions in another convention."""


class Denoiser(torch.nn.Module):
    """A trusted denoiser called with an engine's arguments by name.

    Args:
        model: The model.
        plain: Arguments that are no tensors.
        conversion: What the engine gives instead of the model's own prediction.
    """

    def __init__(
        self, model: torch.nn.Module, plain: Mapping[str, Any], conversion: Conversion
    ) -> None:
        super().__init__()
        self.model = model
        self._plain, self._conversion = dict(plain), conversion

    def by(self, model: torch.nn.Module) -> Denoiser:
        """The same, of another model."""
        return Denoiser(model, self._plain, self._conversion)

    def forward(self, **given: torch.Tensor) -> torch.Tensor:
        """The first tensor that the model returns, with what the engine's convention rounds."""
        latent, sigma = given.pop(LATENT, None), given.pop(SIGMA, None)
        dtype = _working_dtype(self.model)
        moved = {
            name: value.to(dtype)
            if dtype and value.is_floating_point() and name != "timestep"
            else value
            for name, value in given.items()
        }
        output = self.model(**_nested({**moved, **self._plain}))
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, list):  # a sample each
            first = torch.stack(first)
        number = None if sigma is None else float(sigma)
        return self._conversion.there_and_back(first, latent, number)


def _working_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The dtype of most weights: some models keep a few in float32."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def arguments(
    one: Pass, model: torch.nn.Module, template: Pass | None, scale: float
) -> tuple[dict[str, torch.Tensor], dict[str, Any], tuple[str, ...]]:
    """What the trusted model is called with for an engine's prediction.

    Args:
        one: The engine's.
        model: The trusted model.
        template: A prediction of the trusted pipeline, which says what else is given.
        scale: From the engine's time to the model's.

    Returns:
        Tensors, plain values, and what was done beside renaming.

    Raises:
        UsageError: The model needs something that nobody gave.
    """
    parameters = inspect.signature(model.forward).parameters
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {"return_dict": False} if "return_dict" in parameters else {}
    done: list[str] = []
    for name, value in (template.arguments if template else {}).items():
        if _of(name) in parameters and value is not None and name != "return_dict":
            (tensors if isinstance(value, torch.Tensor) else plain)[name] = value
    taken, usual_names = set(), set()
    for role, usual in (("latent", LATENTS), ("timestep", TIMES), ("text", TEXTS)):
        name = next((each for each in usual if each in parameters), "")
        value = one.role(role) if role != "timestep" else _time(one, scale)
        if not name or value is None:
            continue
        like = tensors.get(name)
        if like is not None and role == "timestep":
            same = value.to(like.dtype)  # unless that would round the engine's own time
            value = _time_as(same if bool((same == value).all()) else value, like)
        elif like is not None:
            value, how = (text_as if role == "text" else _in_rank)(value, like)
            done += [how] if how else []
        elif isinstance(one.arguments.get(one.names.get(role, "")), tuple):
            value = value[None]
            done.append("lists of samples to batches")
        tensors[name] = value.contiguous()
        plain.pop(name, None)  # the reference's, where its model takes lists
        taken.add(one.names.get(role, ""))
        usual_names.add(name)
    for name, value in one.arguments.items():  # what both sides call the same
        if _of(name) not in parameters or name in taken:
            continue
        if isinstance(value, torch.Tensor):
            like = tensors.get(name)
            if scale != 1.0 and name.removeprefix(SOUND) in TIMES:
                value = (value.double() * scale).float()
            tensors[name], how = (value, "") if like is None else _in_rank(value, like)
            done += [how] if how else []
        elif name not in plain and _is_plain(value):
            plain[name] = value
    more = [n for n in tensors if n not in one.arguments and n not in usual_names]
    done += [f"{name} of the reference, which the engine does not call so" for name in more]
    held = {*map(_of, (*tensors, *plain))}
    missing = [name for name in _needed(parameters.values()) if name not in held]
    if missing:
        raise UsageError(
            f"the trusted {type(model).__name__} needs {', '.join(missing)}",
            measured=f"the engine gave its model {', '.join(sorted(one.arguments))}",
        )
    return tensors, plain, tuple(done)


def _needed(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Names of parameters that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]


def _of(name: str) -> str:
    """The argument that a value is of: `added_cond_kwargs` of `added_cond_kwargs/time_ids`."""
    return name.partition("/")[0]


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, those named `argument/key` as tables."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        head, _, key = name.partition("/")
        if key:
            found.setdefault(head, {})[key] = value
        else:
            found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word, or several of them."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _in_rank(value: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, str]:
    return as_rank(value, like.ndim)


def _time(one: Pass, scale: float) -> torch.Tensor | None:
    """Time of all samples, or of each token where these have their own."""
    time, given = one.timestep, one.role("timestep")
    if given is not None and given.numel() and bool((given != given.reshape(-1)[0]).any()):
        return (given.double() * scale).float()
    return None if time is None else torch.tensor([time * scale], dtype=torch.float32)


def _time_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if value.numel() == like.numel():
        return value.reshape(like.shape)
    return value.expand(like.shape) if value.numel() == 1 else value


def schedule_of(
    found: tuple[Any, Mapping[str, Any]] | None, steps: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
    """Sigmas and timesteps that a scheduler makes for so many steps; or why it cannot be told."""
    if found is None:
        return None, None, "the trusted folder has no scheduler"
    cls, config = found
    try:
        scheduler = cls.from_config(config)
        for count in range(steps, 0, -1):  # of a higher order it makes several timesteps a step
            scheduler.set_timesteps(count)
            if len(scheduler.timesteps) <= steps:
                break
    except FOREIGN as error:
        why = f"{cls.__name__} makes no schedule of the number of steps alone"
        return None, None, f"{why}: {one_line(error)}"
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas, torch.as_tensor(scheduler.timesteps), ""


def stepped(scheduler: Any, run: Run, sigmas: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Latents after each step, by the trusted scheduler, each from the engine's recorded latent.

    Args:
        scheduler: Set to as many steps.
        run: The engine's.
        sigmas: The engine's own, with the last one; None where the scheduler has none.
    """
    if run.timesteps is not None:
        scheduler.timesteps = torch.as_tensor(run.timesteps)
    if sigmas is not None:
        scheduler.sigmas = sigmas.to(torch.float32)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    found: list[torch.Tensor | None] = []
    for index, step in enumerate(run.steps):
        if step.stepped_by is None or step.latent is None:
            return [*found, *[None] * (len(run.steps) - index)]
        time = scheduler.timesteps[index]
        made = scheduler.step(
            step.stepped_by, time, step.latent.to(step.stepped_by.dtype), return_dict=False
        )
        found.append(made[0])
    return found


def solvers() -> Sequence[tuple[str, str, dict[str, Any]]]:
    """Name, class and settings of solvers that engines step with."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return (
        ("Euler", "FlowMatchEulerDiscreteScheduler", {}),
        ("UniPC of order 2", "UniPCMultistepScheduler", {**flow, "solver_order": 2}),
        ("UniPC of order 3", "UniPCMultistepScheduler", {**flow, "solver_order": 3}),
        ("UniPC of order 1", "UniPCMultistepScheduler", {**flow, "solver_order": 1}),
        ("DPM-Solver++ of order 2", "DPMSolverMultistepScheduler", {**flow, "solver_order": 2}),
        ("DPM-Solver++ of order 3", "DPMSolverMultistepScheduler", {**flow, "solver_order": 3}),
    )

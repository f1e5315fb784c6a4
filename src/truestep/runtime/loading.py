"""Load a case's model: builtin, a local diffusers folder, or a hub id."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from truestep.case import AnyCase, Case
from truestep.controls import AudioVideo
from truestep.environment import usable_device
from truestep.errors import CaseError, MissingExtraError, ModelLoadError
from truestep.reading import parse_json, read
from truestep.runtime.compiling import compile_pipeline
from truestep.runtime.pipeline import Pipeline
from truestep.text import quoted
from truestep.turns import taking_turns

COSMOS = "CosmosTextToWorldPipeline"
LTX2 = ("LTX2Pipeline", "LTX2ImageToVideoPipeline")
SUPPORTED = ("WanPipeline", COSMOS, *LTX2)
"""`_class_name` of the model_index.json files that a family here can run."""

NOTES: Mapping[str, str] = {
    COSMOS: "no safety checker runs here: NVIDIA's licence of the Cosmos weights asks for a "
    "guardrail on prompts and frames that are shown to anyone",
}
"""What is to be said of a model's class beside what is missing."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@taking_turns()
def load(case: Case) -> Pipeline:
    """Load all components in the case's dtype, as `from_pretrained(torch_dtype=...)` does.

    Raises:
        ModelLoadError: The model is absent, incomplete, of another family, or cannot be fetched.
        MissingExtraError: diffusers or transformers is not installed.
    """
    try:
        import diffusers  # noqa: F401 - asked for before the folder is, to name it if absent
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "diffusers", "diffusers", "running a model") from None
    folder = resolve(case)
    family = model_index(folder)["_class_name"]
    if family in LTX2:
        return compile_pipeline(_ltx2(case, folder), case.settings.compile)
    _refuse_audio_video(case, folder)
    pipe = (_cosmos if family == COSMOS else _wan)(case, folder)
    return compile_pipeline(pipe, case.settings.compile)


def _refuse_audio_video(case: Case, folder: Path) -> None:
    """Refuse controls of audio-video models in a case of another family."""
    own = [
        name
        for name in AudioVideo.model_fields
        if name != "videos_per_prompt" and getattr(case.settings, name) is not None
    ]
    if case.settings.text_recipe == "per_branch_connector":
        own = [*own, "text_recipe"]
    if own:
        raise CaseError(
            f"{own[0]} is set, but the model makes video alone",
            where=str(folder),
            hint=f"leave {', '.join(own)} out of the case",
        )


def _wan(case: Case, folder: Path) -> Pipeline:
    import diffusers
    import torch

    from truestep.runtime import wan

    if case.settings.fps is not None:
        raise CaseError(
            "fps is set, but a Wan model is not told any",
            where=str(folder),
            hint="leave fps out of the case",
        )
    device = usable_device(case.settings.device)
    with quiet(), failures(case.model, folder):
        components = diffusers.WanPipeline.from_pretrained(
            folder, dtype=getattr(torch, case.dtype), local_files_only=True
        )
        components.to(device)
    return Pipeline(
        **vars(wan.STAGES),
        tokenizer=components.tokenizer,
        text_encoder=components.text_encoder,
        transformer=components.transformer,
        transformer_2=components.transformer_2,
        vae=components.vae,
        scheduler=components.scheduler,
        settings=case.run_settings(),
        device=device,
        boundary_ratio=components.config.boundary_ratio,
        expand_timesteps=components.config.expand_timesteps,
        weights=fingerprint(folder),
    )


_PARTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")


def _cosmos(case: Case, folder: Path) -> Pipeline:
    """Load the parts one by one: diffusers' pipeline is not to be had without cosmos_guardrail."""
    import torch

    from truestep.runtime import cosmos

    device = usable_device(case.settings.device)
    dtype = getattr(torch, case.dtype)
    with quiet(), failures(case.model, folder):
        config = _table(folder / "transformer" / "config.json")
        cosmos.require_torchvision(bool(config.get("concat_padding_mask", True)))
        index = model_index(folder)
        parts = {part: _part(folder / part, index[part], dtype=dtype) for part in _PARTS}
        for part in ("text_encoder", "transformer", "vae"):
            parts[part].to(device)
    return Pipeline(
        **vars(cosmos.STAGES),
        **parts,
        transformer_2=None,
        settings=case.run_settings(),
        device=device,
        weights=fingerprint(folder),
        output_scale=cosmos.output_scale(parts["scheduler"]),
    )


_LTX2_PARTS = (
    "tokenizer",
    "text_encoder",
    "connectors",
    "transformer",
    "vae",
    "audio_vae",
    "vocoder",
    "scheduler",
)


def _ltx2(case: Case, folder: Path) -> Pipeline:
    """Load the parts that generation needs, whichever of the two pipeline classes saved them."""
    import torch

    from truestep.runtime import ltx2

    device = usable_device(case.settings.device)
    index = model_index(folder)
    missing = [part for part in _LTX2_PARTS if not (index.get(part) or [None])[0]]
    if missing:
        raise ModelLoadError(
            f"the model has no {missing[0]}",
            where=str(folder / "model_index.json"),
            measured=f"missing: {', '.join(missing)}; an LTX-2 model makes video and sound",
            hint="save it with all its parts: LTX2Pipeline.save_pretrained",
        )
    dtype = getattr(torch, case.dtype)
    with quiet(), failures(case.model, folder):
        parts = {part: _part(folder / part, index[part], dtype=dtype) for part in _LTX2_PARTS}
        for part, model in parts.items():
            if part not in ("tokenizer", "scheduler"):
                model.to(device)
    return Pipeline(
        **vars(ltx2.STAGES),
        **parts,
        transformer_2=None,
        settings=case.run_settings(),
        device=device,
        weights=fingerprint(folder),
    )


def _part(folder: Path, kind: Sequence[str], *, dtype: Any) -> Any:
    """Load one component; `kind` is its entry in model_index.json: library and class.

    Raises:
        ValueError: The class is neither diffusers' nor transformers': no other code is run.
    """
    loaded = component_class(folder.name, kind)
    if folder.name in ("tokenizer", "scheduler"):
        return loaded.from_pretrained(folder, local_files_only=True)
    return loaded.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)


def component_class(part: str, kind: Sequence[str]) -> Any:
    """The class of a component, imported; `kind` is its entry in model_index.json.

    Raises:
        ValueError: The class is neither diffusers' nor transformers' (no other code is run), or
            they have none of this name.
        ImportError: Something that it needs cannot be imported.
    """
    library, name = kind
    if library == "ltx2":  # diffusers' own pipeline modules
        library = "diffusers.pipelines.ltx2"
    if library.partition(".")[0] not in ("diffusers", "transformers"):
        raise ValueError(f"{part} is of {library}.{name}, not of diffusers or transformers")
    found = getattr(importlib.import_module(library), name, None)
    if found is None:
        raise ValueError(f"{library} has no class {name}")
    found.from_pretrained  # noqa: B018 - of a stand-in for what is not installed, this raises
    return found


_RAISED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
)
"""What the libraries raise over a folder that is damaged, or that they cannot load."""


@contextmanager
def failures(model: str, folder: Path) -> Iterator[None]:
    """Whatever the libraries raise over a damaged folder, as one clear error."""
    try:
        yield
    except _RAISED as error:
        absent = import_error(error)
        if absent is not None:
            raise ModelLoadError(
                "a part of the model cannot be imported",
                where=str(folder),
                measured=f"{type(absent).__name__}: {absent}",
                likely="a package that it needs is missing, or of another version: nothing is "
                "wrong with the folder",
                hint=f"truestep doctor {quoted(model)}",
            ) from error
        raise ModelLoadError(
            "the model could not be loaded",
            where=str(folder),
            measured=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
            likely="a component's folder, weights or configuration is missing or damaged",
            hint=f"truestep doctor {quoted(model)}",
        ) from error


def import_error(error: BaseException | None) -> ImportError | None:
    """The failed import that an error comes of, if it does; libraries raise others over it."""
    first = None
    while error is not None:
        first = error if isinstance(error, ImportError) else first
        error = error.__cause__ or error.__context__
    return first


def resolve(case: Case) -> Path:
    """Folder of the case's model; a hub id is fetched (or found in the local cache) first.

    Raises:
        ModelLoadError: There is no such folder or hub model, or it is of an unsupported family.
    """
    folder = folder_of(case)
    name = model_index(folder).get("_class_name")
    if name not in SUPPORTED:
        raise ModelLoadError(
            f"models of class {name} are not run in stages",
            where=str(index_of(folder)),
            measured=f"in stages: {', '.join(SUPPORTED)}",
            hint="record and check run any pipeline: give --prompt, or a table [case.NAME.call]",
        )
    return folder


def folder_of(case: AnyCase) -> Path:
    """Folder of a case's model, of whatever class; a hub id is fetched first.

    Raises:
        ModelLoadError: There is no such folder or hub model, or it holds no pipeline.
    """
    if case.model == "builtin:digits":
        from truestep.models import digits

        folder = digits.path()
    else:
        folder = case.model_path
        if not folder.exists() and _HUB_ID.fullmatch(case.model):
            folder = _from_hub(case.model, case.revision)
    _require_index(folder)
    return folder


def refuse_no_folder(case: AnyCase) -> None:
    """Refuse a model, none of the builtin ones, that is no hub id and no folder with a pipeline.

    Raises:
        ModelLoadError: See above.
    """
    if not _HUB_ID.fullmatch(case.model):
        _require_index(case.model_path)


def _require_index(folder: Path) -> None:
    if not index_of(folder).is_file():
        what = "is not a diffusers model" if folder.exists() else "does not exist"
        raise ModelLoadError(
            f"the model folder {what}",
            where=str(folder),
            measured="a diffusers model has a model_index.json",
            hint="give builtin:digits, a diffusers folder, or a hub id like Wan-AI/NAME",
        )


def runs_in_stages(case: AnyCase) -> bool:
    """Whether truestep's own runtime has the stages of a case's model, as far as can be told
    without fetching it; what cannot be read is left to whoever loads it."""
    if case.model.startswith("builtin:"):
        return True
    folder = case.model_path
    if folder.exists() or not _HUB_ID.fullmatch(case.model):
        return not index_of(folder).is_file() or model_index(folder).get("_class_name") in SUPPORTED
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(case.model, "model_index.json", revision=case.revision)
        return _table(Path(path)).get("_class_name") in SUPPORTED
    except Exception:  # of the hub, its HTTP library and the network: loading says what is wrong
        return True


INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"


def index_of(folder: Path) -> Path:
    """The file that says what a model folder holds; that of blocks where there is no other."""
    own, blocks = folder / INDEX, folder / MODULAR_INDEX
    return blocks if blocks.is_file() and not own.is_file() else own


def model_index(folder: Path) -> dict[str, Any]:
    """What a model folder holds, by its index.

    Raises:
        ModelLoadError: It cannot be read.
    """
    return _table(index_of(folder))


def _table(path: Path) -> dict[str, Any]:
    def parse(data: bytes) -> dict[str, Any]:
        found = parse_json(data)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
        return found

    return read(path, f"{path.name} cannot be read", parse, raises=ModelLoadError)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision))
    except Exception as error:  # every failure of the hub client, its HTTP library and the network
        raise ModelLoadError(
            f"the model {model} could not be fetched from the hub",
            where=f"revision {revision or 'main'}",
            measured=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            likely="no network, no such model, or a gated one without a token",
            hint=f"hf download {quoted(model)}  # then give its folder as model",
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' loading bars; ours are the only ones shown."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    modules: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    active = [module.is_progress_bar_enabled() for module in modules]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, was_active in zip(modules, active, strict=True):
            if was_active:
                module.enable_progress_bar()


def fingerprint(folder: Path) -> str:
    """16 digits of a SHA-256 over names, sizes and sampled bytes of a model folder's files.

    Of a file above 4 MiB, the first and last 64 KiB and 62 blocks between count, so that a 30 GB
    model takes well under a second; smaller files count whole.
    """
    block, samples = 65536, 64
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors"}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= block * samples:
                digest.update(file.read())
                continue
            for index in range(samples):
                file.seek((size - block) * index // (samples - 1))
                digest.update(file.read(block))
    return digest.hexdigest()[:16]

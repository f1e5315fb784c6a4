"""FastVideo's latent gate: its bundles, folders and result files, its two limits, and our verdict.

`from truestep.dropin.fastvideo import run_text_to_latent_similarity_test` takes the place of the
same import from `fastvideo.tests.ssim.latent_similarity_utils`. Two things are otherwise. A bundle
is read as if it were hostile and runs no code. And truestep's verdict on the whole latent stands
beside the two limits: in the log, in the result file under `truestep`, and as `.comparison` of the
metrics. It decides nothing: NaN passes the two limits here as there, and the log warns of it.

Source:
    fastvideo 0.2.1, fastvideo/tests/ssim/latent_similarity_utils.py (bundle format_version 1).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.dropin.elsewhere import handed_on, tell
from truestep.errors import TruestepError, UsageError, WriteError, one_line

if TYPE_CHECKING:
    import torch

    from truestep.verdict import Comparison

ORIGINAL = "fastvideo.tests.ssim.latent_similarity_utils"

LATENT_REFERENCE_EXTENSION = ".pt"
LATENT_REFERENCE_FORMAT_VERSION = 1

DEFAULT_SLICE_SPEC: dict[str, Any] = {"kind": "corner_3x3_first_frame", "version": 1}
AUDIO_FIRST_8_TIMESTEPS_SPEC: dict[str, Any] = {"kind": "audio_first_8_timesteps", "version": 1}
_KINDS = (DEFAULT_SLICE_SPEC["kind"], AUDIO_FIRST_8_TIMESTEPS_SPEC["kind"])

_PROMPT = 100
"""Characters of the prompt in the name of a file."""


class LatentMetrics(dict[str, float]):
    """FastVideo's three numbers.

    Attributes:
        comparison: Truestep's verdict on the whole latents, in the float16 of the bundle.
    """

    comparison: Comparison | None = None


def __getattr__(name: str) -> object:
    return handed_on(ORIGINAL, name)


def save_latent_reference(
    path: str,
    latent: torch.Tensor,
    *,
    metadata: dict[str, Any],
    slice_spec: dict[str, Any] | None = None,
) -> None:
    """Write a bundle: the latent in float16, its float32 signature, and what the caller says.

    Args:
        path: The file; its folder is made if need be.
        latent: Video `b c f h w` or audio `b c l`.
        metadata: Plain values; what needs code to be read is not read again by anything here.
        slice_spec: `kind` and `version` of the signature.

    Raises:
        ValueError: The signature's kind is unknown, or does not fit the latent.
    """
    import torch

    spec = DEFAULT_SLICE_SPEC if slice_spec is None else slice_spec
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    own = latent.detach().to("cpu")
    bundle = {
        "latent": own.to(torch.float16),
        "shape": list(own.shape),
        "dtype_original": str(own.dtype),
        "expected_slice": _signature(own, spec),
        "slice_spec": spec,
        "metadata": metadata,
        "format_version": LATENT_REFERENCE_FORMAT_VERSION,
    }
    torch.save(bundle, path)


def load_latent_reference(path: str) -> dict[str, Any]:
    """Read a bundle on the CPU, without running code that is in it.

    Raises:
        OSError: The file cannot be opened.
        FileFormatError: It is damaged, needs code, or claims more than it holds.
        ValueError: It is no bundle of `LATENT_REFERENCE_FORMAT_VERSION`.
    """
    from truestep.recording.torch_files import read_pt

    with open(path, "rb"):  # FileNotFoundError, as of whoever opens a file
        pass
    bundle = read_pt(Path(path))
    stated = bundle.get("format_version") if isinstance(bundle, dict) else None
    if stated != LATENT_REFERENCE_FORMAT_VERSION:
        raise ValueError(
            f"{path!r} is a latent bundle of format_version {stated!r}, and this reads "
            f"{LATENT_REFERENCE_FORMAT_VERSION}: make it again with the test that wrote it"
        )
    loaded: dict[str, Any] = bundle
    return loaded


def write_latent_similarity_results(  # 12 parameters: the signature is FastVideo's
    output_dir: str,
    metrics: dict[str, float],
    *,
    reference_path: str,
    generated_path: str,
    num_inference_steps: int,
    prompt: str,
    model_id: str,
    attention_backend_name: str,
    slice_spec: dict[str, Any],
    slice_cosine_threshold: float,
    full_cosine_threshold: float,
    passed: bool,
) -> bool:
    """Write `steps{N}_{prompt}_latent.json` into a folder, with our verdict under `truestep`.

    Args:
        metrics: Of FastVideo; where they carry no verdict of ours, the two files are compared.

    Returns:
        Whether the file could be written.
    """
    from truestep.files import write_text

    name = f"steps{num_inference_steps}_{prompt[:_PROMPT].strip()}_latent.json"
    content = {
        "metrics": metrics,
        "reference_latent": reference_path,
        "generated_latent": generated_path,
        "model_id": model_id,
        "attention_backend": attention_backend_name,
        "slice_spec": slice_spec,
        "thresholds": {
            "slice_cosine": slice_cosine_threshold,
            "full_cosine": full_cosine_threshold,
        },
        "passed": passed,
        "parameters": {"num_inference_steps": num_inference_steps, "prompt": prompt},
        "truestep": _beside(metrics, generated_path, reference_path),
    }
    text = json.dumps(content, indent=2, sort_keys=True)
    try:
        os.makedirs(output_dir, exist_ok=True)
        target = Path(output_dir) / name
        if not target.parent.is_dir():  # of a prompt with a slash in it: FastVideo writes none
            return False
        write_text(target, text, "the result file")
    except (OSError, WriteError):
        return False
    return True


def run_text_to_latent_similarity_test(  # 13 parameters: the signature is FastVideo's
    *,
    logger: Logger,
    script_dir: str,
    device_reference_folder: str,
    prompt: str,
    attention_backend_name: str,
    model_id: str,
    default_params_map: dict[str, dict[str, object]],
    full_quality_params_map: dict[str, dict[str, object]],
    slice_cosine_threshold: float = 5e-3,
    full_cosine_threshold: float = 1e-2,
    init_kwargs_override: dict[str, object] | None = None,
    generation_kwargs_override: dict[str, object] | None = None,
    slice_spec: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Generate a latent with FastVideo, write it as a bundle, and gate it by the reference's.

    Args:
        script_dir: Folder of the test; references and what is generated lie below it.
        default_params_map, full_quality_params_map: Model id to what it is run with.
        slice_cosine_threshold, full_cosine_threshold: Largest cosine distances that pass.
        init_kwargs_override, generation_kwargs_override: Laid over what the parameters say.

    Returns:
        FastVideo's three metrics, as `LatentMetrics`.

    Raises:
        AssertionError: A distance exceeds its limit, or the shapes differ.
        FileNotFoundError: There is no reference.
        FileFormatError: The reference needs code to be read, or is damaged.
        RuntimeError: FastVideo returned no latent.
    """
    from fastvideo.tests.ssim import inference_similarity_utils as running
    from fastvideo.tests.ssim import reference_utils

    place = (script_dir, device_reference_folder, model_id, attention_backend_name)
    with running.attention_backend(attention_backend_name):
        output_dir = reference_utils.build_generated_output_dir(*place)
        os.makedirs(output_dir, exist_ok=True)
        params = reference_utils.select_ssim_params(default_params_map, full_quality_params_map)
        base = params[model_id]
        steps = int(base["num_inference_steps"])
        init = {**running.build_init_kwargs(base), **(init_kwargs_override or {})}
        call = running.build_generation_kwargs(base, steps, output_dir)
        call |= {"save_video": False, "return_frames": True, **(generation_kwargs_override or {})}
        generated = _generate(prompt, base["model_path"], {**init, "output_type": "latent"}, call)
    latent = _latent_of(generated)
    name = f"{prompt[:_PROMPT].strip()}{LATENT_REFERENCE_EXTENSION}"
    run = _Run(prompt, model_id, attention_backend_name, steps, output_dir)
    path = os.path.join(output_dir, name)
    spec = DEFAULT_SLICE_SPEC if slice_spec is None else slice_spec
    save_latent_reference(path, latent, metadata=run.metadata(), slice_spec=spec)
    logger.info("Saved generated latent to %s", path)
    reference = _reference(reference_utils.build_reference_folder_path(*place), name, path)
    limits = {"slice_cosine": slice_cosine_threshold, "full_cosine": full_cosine_threshold}
    return _gated(latent, path, reference, limits=limits, run=run, logger=logger)


@dataclass(frozen=True)
class _Run:
    """What was run, as the files name it."""

    prompt: str
    model_id: str
    attention_backend: str
    num_inference_steps: int
    output_dir: str

    def metadata(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "model_id": self.model_id,
            "attention_backend": self.attention_backend,
            "num_inference_steps": self.num_inference_steps,
        }


def _generate(prompt: str, model: object, init: dict[str, Any], call: dict[str, Any]) -> object:
    from fastvideo import VideoGenerator
    from fastvideo.tests.ssim.inference_similarity_utils import shutdown_executor

    generator = None
    try:
        generator = VideoGenerator.from_pretrained(model_path=model, **init)
        return generator.generate_video(prompt, **call)
    finally:
        shutdown_executor(generator)


def _latent_of(generated: object) -> torch.Tensor:
    """The latent that FastVideo returned, float32 on the CPU."""
    import torch

    latent = generated.get("samples") if isinstance(generated, dict) else None
    if not isinstance(latent, torch.Tensor):
        got = type(generated).__name__ if not isinstance(generated, dict) else type(latent).__name__
        raise RuntimeError(
            f"generate_video gave no latent but a {got}: it needs output_type='latent' and "
            "return_frames=True"
        )
    if latent.ndim not in (3, 5):
        raise RuntimeError(
            f"generate_video gave a latent of shape {tuple(latent.shape)}: video is b c f h w, "
            "audio b c l"
        )
    return latent.detach().to(torch.float32).cpu()


def _reference(folder: str, name: str, generated: str) -> str:
    """Path of the reference bundle; in FastVideo's bootstrap mode its absence is an xfail there."""
    from fastvideo.tests.ssim.bootstrap_references import xfail_missing_reference_in_bootstrap_mode

    path = os.path.join(folder, name)
    missing = next((place for place in (folder, path) if not os.path.exists(place)), None)
    if missing is None:
        return path
    xfail_missing_reference_in_bootstrap_mode(
        generated_artifact_path=generated, reference_folder=folder, artifact_kind="latent"
    )
    raise FileNotFoundError(
        f"there is no reference latent: {missing} is missing; "
        "python fastvideo/tests/ssim/reference_videos_cli.py download gets them"
    )


def _gated(
    latent: torch.Tensor,
    path: str,
    reference: str,
    *,
    limits: Mapping[str, float],
    run: _Run,
    logger: Logger,
) -> LatentMetrics:
    """Judge a latent by a reference as FastVideo does, write the result file, and raise."""
    stored = load_latent_reference(reference)
    spec = stored.get("slice_spec", DEFAULT_SLICE_SPEC)
    shape = tuple(stored.get("shape", stored["latent"].shape))
    where = f"{run.model_id} with backend {run.attention_backend}"
    if tuple(latent.shape) != shape:
        raise AssertionError(
            f"the latent of {where} has shape {tuple(latent.shape)}, its reference {shape}"
        )
    metrics = _measured(latent, stored, spec)
    distances = {name: metrics[f"{name}_distance"] for name in limits}
    over = [f"{n} {d:.6e} > {limits[n]:.6e}" for n, d in distances.items() if d > limits[n]]
    metrics.comparison = _judged(latent, stored["latent"], metrics, limits, passed=not over)
    logger.info("Latent regression metrics of %s: %s", where, dict(metrics))
    tell(logger, metrics.comparison, passed=not over)
    write_latent_similarity_results(
        run.output_dir,
        metrics,
        reference_path=reference,
        generated_path=path,
        num_inference_steps=run.num_inference_steps,
        prompt=run.prompt,
        model_id=run.model_id,
        attention_backend_name=run.attention_backend,
        slice_spec=spec,
        slice_cosine_threshold=limits["slice_cosine"],
        full_cosine_threshold=limits["full_cosine"],
        passed=not over,
    )
    if over:
        raise AssertionError(
            f"the latent of {where} is too far from its reference: {'; '.join(over)}; all metrics: "
            f"{dict(metrics)}; truestep: {metrics.comparison.sentence}"
        )
    return metrics


def _measured(
    latent: torch.Tensor, stored: Mapping[str, Any], spec: dict[str, Any]
) -> LatentMetrics:
    """FastVideo's three numbers; the whole latent in float16 on both sides, as it is stored."""
    import torch

    whole, own = stored["latent"].to(torch.float32), latent.to(torch.float16).to(torch.float32)
    return LatentMetrics(
        slice_cosine_distance=_distance(_signature(latent, spec), stored["expected_slice"]),
        full_cosine_distance=_distance(own, whole),
        max_abs_diff=float((own - whole).abs().max()),
    )


def _judged(
    latent: torch.Tensor,
    reference: torch.Tensor,
    metrics: Mapping[str, float],
    limits: Mapping[str, float],
    *,
    passed: bool,
) -> Comparison:
    """Truestep's verdict on the whole latents, FastVideo's outcome among its gates."""
    from truestep.judge.latent import GATE
    from truestep.verdict import GateResult

    gate = GateResult(name=GATE, passed=passed, metrics=dict(metrics), thresholds=dict(limits))
    return _compared(latent, reference).model_copy(update={"gates": (gate,)})


def _compared(latent: torch.Tensor, reference: torch.Tensor) -> Comparison:
    import torch

    from truestep.judge.compare import compare
    from truestep.judge.latent import LATENT

    halves = ({LATENT: side.detach().to("cpu", torch.float16)} for side in (latent, reference))
    return compare(*halves)


def _beside(metrics: dict[str, float], generated: str, reference: str) -> dict[str, Any]:
    """Our verdict for a result file: what the metrics carry, else of the two bundles."""
    comparison = getattr(metrics, "comparison", None)
    if comparison is None:
        try:
            sides = [load_latent_reference(path)["latent"] for path in (generated, reference)]
            comparison = _compared(*sides)
        except (OSError, ValueError, KeyError, AttributeError, TruestepError) as error:
            return {"verdict": None, "sentence": f"not judged: {one_line(error)}"}
    return {
        "verdict": comparison.verdict.value,
        "sentence": comparison.sentence,
        "tool_version": comparison.tool_version,
    }


def _signature(latent: torch.Tensor, spec: Mapping[str, Any]) -> torch.Tensor:
    """The float32 signature of a latent.

    Raises:
        ValueError: Its kind is unknown, or does not fit the latent.
    """
    from truestep.judge.latent import SLICES

    kind = spec.get("kind", DEFAULT_SLICE_SPEC["kind"])
    if kind not in _KINDS:
        raise ValueError(f"no signature is called {kind!r}; known: {', '.join(_KINDS)}")
    try:
        return SLICES[kind].cut(latent).clone()
    except UsageError as error:
        raise ValueError(f"{error.what}: {error.measured}") from None


def _distance(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """1 - cosine similarity in float32, of any two tensors of one number of elements."""
    import torch

    from truestep.judge.latent import cosine_float32

    own, other = (t.detach().to(torch.float32).reshape(-1) for t in (actual, reference))
    if own.shape != other.shape:
        raise ValueError(f"{own.numel()} elements cannot be compared with {other.numel()}")
    return cosine_float32(own, other)

"""Load a case's model: builtin, a local diffusers folder, or a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from truestep.case import Case
from truestep.environment import usable_device
from truestep.errors import MissingExtraError, ModelLoadError
from truestep.runtime.pipeline import Pipeline

SUPPORTED = ("WanPipeline",)
"""`_class_name` of the model_index.json files that a family here can run."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def load(case: Case) -> Pipeline:
    """Load all components in the case's dtype, as `from_pretrained(torch_dtype=...)` does.

    Raises:
        ModelLoadError: The model is absent, incomplete, of another family, or cannot be fetched.
        MissingExtraError: diffusers or transformers is not installed.
    """
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise MissingExtraError(error.name or "diffusers", "diffusers", "running a model") from None
    from truestep.runtime import wan

    folder = resolve(case)
    device = usable_device(case.settings.device)
    with _quiet():
        try:
            components = diffusers.WanPipeline.from_pretrained(
                folder, dtype=getattr(torch, case.dtype), local_files_only=True
            )
            components.to(device)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ModelLoadError(
                "the model could not be loaded",
                where=str(folder),
                measured=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
                likely="a component's folder, weights or configuration is missing or damaged",
                hint=f"truestep doctor --model {case.model}",
            ) from error
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


def resolve(case: Case) -> Path:
    """Folder of the case's model; a hub id is fetched (or found in the local cache) first.

    Raises:
        ModelLoadError: There is no such folder or hub model, or it is of an unsupported family.
    """
    if case.model == "builtin:digits":
        from truestep.models import digits

        folder = digits.path()
    else:
        folder = case.model_path
        if not folder.exists() and _HUB_ID.fullmatch(case.model):
            folder = _from_hub(case.model, case.revision)
    index = folder / "model_index.json"
    if not index.is_file():
        what = "is not a diffusers model" if folder.exists() else "does not exist"
        raise ModelLoadError(
            f"the model folder {what}",
            where=str(folder),
            measured="a diffusers model has a model_index.json",
            hint="give builtin:digits, a diffusers folder, or a hub id like Wan-AI/NAME",
        )
    try:
        name = json.loads(index.read_text("utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(
            "model_index.json cannot be read", where=str(index), measured=str(error)
        ) from None
    if name not in SUPPORTED:
        raise ModelLoadError(
            f"models of class {name} are not supported",
            where=str(index),
            measured=f"supported: {', '.join(SUPPORTED)}",
            hint="gate the latents of any engine with truestep.check_latent()",
        )
    return folder


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
            hint=f"hf download {model}, then give its folder as model",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
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

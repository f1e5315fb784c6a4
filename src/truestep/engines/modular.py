"""Modular pipelines of diffusers: blocks, and the components that they expect, from one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep.call_case import CallCase
from truestep.engines.arguments import signature_of_blocks
from truestep.engines.folders import Model, no_class, refuse_code, scheduler_class
from truestep.errors import ModelLoadError
from truestep.runtime.loading import MODULAR_INDEX, index_of, model_index


def is_modular(case: CallCase, folder: Path) -> bool:
    """Whether a folder holds blocks, or the case names blocks to run its components by."""
    return index_of(folder).name == MODULAR_INDEX or _blocks_class(case.pipeline) is not None


def look_at(case: CallCase, folder: Path, index: Mapping[str, Any]) -> Model:
    """Everything of a modular pipeline but its components, which are not loaded yet.

    Raises:
        CaseError: There are no such blocks.
        ModelLoadError: It brings code of its own, or its class is none of diffusers'.
    """
    import diffusers

    file = index_of(folder)
    refuse_code(file, index)
    cls = _blocks_class(case.pipeline)
    if case.pipeline is not None and cls is None:
        raise no_class(case.pipeline, "Blocks", where="pipeline")
    if file.name == MODULAR_INDEX:
        _refuse_elsewhere(file, index)
        name = str(index["_class_name"])
        pipeline = getattr(diffusers, name, None)
        if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.ModularPipeline)):
            raise ModelLoadError(f"diffusers has no modular pipeline {name!r}", where=str(file))
        blocks = (cls or _own_blocks(pipeline, index, file))()
        pipe = pipeline(
            blocks=blocks, pretrained_model_name_or_path=str(folder), local_files_only=True
        )
    else:
        blocks = cls()
        pipe = blocks.init_pipeline(str(folder))
    return Model(
        folder=folder,
        name=type(blocks).__name__,
        pipeline=type(pipe),
        signature=signature_of_blocks(blocks, case),
        scheduler=scheduler_class(case, index.get("scheduler"), folder),
        load=lambda dtype: with_components(pipe, folder, dtype),
    )


def load_again(folder: Path) -> Any:
    """The modular pipeline that a folder holds, in float32.

    Raises:
        ModelLoadError, ValueError: It cannot be loaded.
    """
    import torch

    case = CallCase(model=str(folder))
    return look_at(case, folder, model_index(folder)).load(torch.float32)


def with_components(pipe: Any, folder: Path, dtype: Any) -> Any:
    """Load the components that are in the folder; no other place is asked for one.

    Raises:
        ValueError: One that is there cannot be loaded.
    """
    import torch

    loaded = {}
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        part = folder / (spec.subfolder or name)
        if _is_there(part):
            model = spec.type_hint is None or issubclass(spec.type_hint, torch.nn.Module)
            loaded[name] = spec.load(
                pretrained_model_name_or_path=str(folder),
                subfolder=spec.subfolder or name,
                revision=None,
                dtype=dtype,
                local_files_only=True,
                **({"use_safetensors": True} if model else {}),
            )
    pipe.register_components(**loaded)
    _without_bars(pipe._blocks)
    return pipe


def _without_bars(blocks: Any) -> None:
    """Silence the progress bars of loops, which are blocks of blocks."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for inner in (getattr(blocks, "sub_blocks", None) or {}).values():
        _without_bars(inner)


def _is_there(part: Path) -> bool:
    return part.is_dir() and any(part.iterdir())


def _refuse_elsewhere(file: Path, index: Mapping[str, Any]) -> None:
    """Refuse an index whose parts lie in other folders or repositories: they are not fetched."""
    for part, kind in index.items():
        said = kind[2] if isinstance(kind, list) and len(kind) == 3 else None
        said = said if isinstance(said, dict) else {}
        source = said.get("pretrained_model_name_or_path")
        if source and not _is_there(file.parent / str(said.get("subfolder") or part)):
            raise ModelLoadError(
                f"the folder has no {part}",
                where=str(file),
                measured=f"it is said to be in {source}",
                likely="parts of other repositories are not fetched: put it into the folder",
            )


def _own_blocks(pipeline: Any, index: Mapping[str, Any], file: Path) -> Any:
    """The blocks that a folder was made of; of ones without a class, the pipeline's own."""
    cls = _blocks_class(str(index.get("_blocks_class_name")))
    if not getattr(cls, "block_classes", None):
        cls = _blocks_class(pipeline.default_blocks_name)
    if cls is None:
        raise ModelLoadError(
            "diffusers has no such blocks",
            where=str(file),
            measured=f"{index.get('_blocks_class_name')}, of a {pipeline.__name__}",
        )
    return cls


def _blocks_class(name: str | None) -> Any:
    """The class of blocks of this name, or of a modular pipeline's own, if diffusers has one."""
    import diffusers

    found = getattr(diffusers, name, None) if name else None
    if not isinstance(found, type):
        return None
    if issubclass(found, diffusers.ModularPipeline):
        return _blocks_class(vars(found).get("default_blocks_name"))
    return found if issubclass(found, diffusers.ModularPipelineBlocks) else None

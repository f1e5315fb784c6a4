"""Tiny modular pipelines: blocks of diffusers, with the components that they expect."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import pkgutil
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import diffusers.modular_pipelines as families
import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from truestep.errors import UsageError, one_line
from truestep.testing.tiny.building import Draw, build_components, chosen
from truestep.testing.tiny.calls import ARGUMENTS, REQUIRED, changed
from truestep.testing.tiny.exceptions import EXCEPTIONS, refuse_obstacle
from truestep.testing.tiny.facts import Facts
from truestep.testing.tiny.words import texts

_OUTPUTS = ("images", "videos", "audios", "latents")
_FACTOR = 8
"""The reduction of an autoencoder that image processors take for granted."""


@cache
def _blocks() -> dict[str, tuple[str, type[Any]]]:
    """Exported blocks of whole pipelines: name to family and class."""
    exported: dict[str, tuple[str, type[Any]]] = {}
    for family in pkgutil.iter_modules(families.__path__):
        if not family.ispkg:
            continue
        module = importlib.import_module(f"{families.__name__}.{family.name}")
        for name in dir(module):
            cls = getattr(module, name)
            if (
                name.endswith("Blocks")
                and isinstance(cls, type)
                and issubclass(cls, ModularPipelineBlocks)
            ):
                exported[name] = (family.name, cls)
    return exported


def names() -> list[str]:
    """Configurations: `family/Blocks`, and `family/Blocks/workflow` where blocks have workflows."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (family, cls) in sorted(_blocks().items()):
            workflows = list(getattr(cls, "_workflow_map", None) or {})
            found += [f"{family}/{name}/{workflow}" for workflow in workflows]
            found += [] if workflows else [f"{family}/{name}"]
    return sorted(found)


def _of(name: str) -> tuple[str, str, str, Any]:
    """Family, blocks' name, workflow, and the blocks that this workflow runs."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        raise UsageError(
            f"diffusers has no modular configuration {name!r}",
            measured=f"nearest names: {', '.join(near)}" if near else "",
        )
    family, blocks_name, *workflow = name.split("/")
    blocks = _blocks()[blocks_name][1]()
    if workflow:
        return family, blocks_name, workflow[0], blocks.get_workflow(workflow[0])
    return family, blocks_name, "", blocks


def build(name: str, *, seed: int, dtype: torch.dtype) -> Any:
    """Build the pipeline of a configuration, in evaluation mode, on the CPU.

    Raises:
        UsageError: No such configuration, or a component without a tiny configuration.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family, blocks_name, workflow, blocks = _of(name)
        refuse_obstacle(blocks_name)
        pipe = blocks.init_pipeline()
        changes = EXCEPTIONS.get(name, EXCEPTIONS.get(blocks_name, {}))
        specs = {c.name: c for c in blocks.expected_components}
        slots = {
            slot: kind
            for slot, spec in specs.items()
            if spec.default_creation_method == "from_pretrained"
            and not (slot in changes and changes[slot] is None)
            and (kind := chosen(spec.type_hint, changes.get(slot))) is not None
        }
        facts = Facts(
            f"{type(pipe).__name__}/{workflow}",
            {slot: kind.__name__ for slot, kind in slots.items()},
            shifts="calculate_shift(" in _source(family, "before_denoise"),
        )
        sentences = texts(f"{families.__name__}.{family}.encoders")
        components = build_components(slots, changes, facts, sentences, Draw(seed, dtype))
        pipe.update_components(**components)
        _configure(pipe)
        _rescale(pipe, specs)
    return pipe


def _configure(pipe: Any) -> None:
    """Settings that a checkpoint would bring: random pictures need no checker."""
    if "enable_safety_checker" in pipe.config:
        pipe.update_components(enable_safety_checker=False)
    if "distilled_sigmas" in pipe.config:
        pipe.update_components(distilled_sigmas=[1.0, 0.7, 0.4])


def save(pipe: Any, name: str, folder: Path) -> None:
    """Write a pipeline of a configuration to a new folder, as one of the blocks' own class.

    Raises:
        UsageError: What was written could not be loaded again; then nothing is left.
    """
    from truestep.engines.modular import load_again

    blocks_name = name.split("/")[1]
    try:
        pipe.save_pretrained(str(folder), overwrite_modular_index=True)
        index = folder / "modular_model_index.json"
        said = {**json.loads(index.read_text("utf-8")), "_blocks_class_name": blocks_name}
        index.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", "utf-8")
        again = load_again(folder)
        if type(again.blocks).__name__ != blocks_name:
            raise ValueError(f"diffusers exports no {blocks_name}: it is loaded as another")
        held = {part for part, value in pipe.components.items() if value is not None}
        lost = sorted(part for part in held if again.components.get(part) is None)
        if lost:
            raise ValueError(f"{', '.join(lost)} is not written")
    except Exception as error:  # of diffusers and transformers, which raise almost anything
        shutil.rmtree(folder, ignore_errors=True)
        raise UsageError(
            f"a folder of {name} could not be loaded here",
            where=type(pipe).__name__,
            measured=one_line(error),
            likely="diffusers.ModularPipeline.from_pretrained does not give it back",
        ) from error


def _names(triggers: Any) -> set[str]:
    """Names of the arguments that choose a workflow, in any of their spellings."""
    spellings = triggers if isinstance(triggers, tuple) else (triggers,)
    return {name for spelling in spellings for name in spelling}


def _source(family: str, module: str) -> str:
    try:
        return inspect.getsource(importlib.import_module(f"{families.__name__}.{family}.{module}"))
    except ModuleNotFoundError:
        return ""


def _rescale(pipe: Any, specs: dict[str, Any]) -> None:
    """Give image processors the reduction of the tiny autoencoder."""
    factor = getattr(pipe, "vae_scale_factor", getattr(pipe, "vae_scale_factor_spatial", None))
    for slot, spec in specs.items():
        config = dict(spec.config or {})
        if (
            spec.default_creation_method == "from_config"
            and "vae_scale_factor" in config
            and factor
        ):
            config["vae_scale_factor"] = max(1, config["vae_scale_factor"] * factor // _FACTOR)
            pipe.update_components(**{slot: spec.type_hint(**config)})


def example_call(name: str, *, seed: int) -> dict[str, Any]:
    """Arguments for one quick call, `output` included, with a new generator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, blocks_name, workflow, blocks = _of(name)
    taken = {parameter.name for parameter in blocks.inputs}
    call = {argument: make(seed) for argument, make in ARGUMENTS.items() if argument in taken}
    triggers = getattr(_blocks()[blocks_name][1], "_workflow_map", None) or {}
    if workflow:
        ours = triggers[workflow]
        ours = ours[0] if isinstance(ours, tuple) else ours
        call |= {name: REQUIRED[name](seed) for name in set(ours) & set(REQUIRED)}
        others = {argument for given in triggers.values() for argument in _names(given)} - set(ours)
        call = {argument: value for argument, value in call.items() if argument not in others}
    given = [output.name for output in blocks.outputs]
    call["output"] = next((output for output in _OUTPUTS if output in given), given[0])
    return changed(changed(call, blocks_name, seed), name, seed)

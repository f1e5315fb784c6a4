"""Build a pipeline's components from the annotations of its constructor."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import FunctionType, UnionType
from typing import Any

import diffusers
import torch
import transformers

from truestep.errors import UsageError
from truestep.testing.tiny import tokenizers
from truestep.testing.tiny.autoencoders import AUTOENCODERS
from truestep.testing.tiny.denoisers import DENOISERS
from truestep.testing.tiny.encoders import configuration
from truestep.testing.tiny.exceptions import EXCEPTIONS, Change, Use, refuse_obstacle
from truestep.testing.tiny.facts import Facts
from truestep.testing.tiny.processors import IMAGES, WITH_TOKENIZER
from truestep.testing.tiny.schedulers import ANY, SCHEDULERS
from truestep.testing.tiny.weights import randomise
from truestep.testing.tiny.words import texts
from truestep.text import quoted

LEFT_OUT = ("SafetyChecker", "Watermarker")
"""Ends of the names of classes that judge or mark a picture: left out, as pipelines allow."""

_NOT_STANDARD = re.compile(
    "Modular|Output|Legacy|AutoPipeline|^DiffusionPipeline$|Mixin|Blocks|Quantization"
)

ABSTRACT = {
    "PreTrainedModel": "Qwen3Model",
    "GemmaPreTrainedModel": "GemmaModel",
    "Gemma2PreTrainedModel": "Gemma2Model",
    "BaseGuidance": "ClassifierFreeGuidance",
    "SchedulerMixin": "FlowMatchEulerDiscreteScheduler",
}
"""What is built where a pipeline asks for any model or scheduler of a kind."""

NEEDED = ("transformer",)
"""Components that are built though they may be none: without them nothing can be called."""

ANY_TOKENIZER = ("AutoTokenizer", "TokenizersBackend", "PreTrainedTokenizerBase", "PythonBackend")


class NoChecker:
    """Stands where Cosmos asks for NVIDIA's guardrail: random pictures need none."""

    def to(self, *_: Any, **__: Any) -> NoChecker:
        """Be on any device."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """Let every prompt pass."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Give every frame back as it came."""
        return frames


def names() -> list[str]:
    """Names that diffusers exports for pipelines, imported or not; modular ones left out."""
    return sorted(
        name for name in dir(diffusers) if "Pipeline" in name and not _NOT_STANDARD.search(name)
    )


def pipeline_class(name: str, *, folder: str = "tiny") -> type[Any]:
    """Find a pipeline class.

    Args:
        name: What it is called.
        folder: Where it is to be written, for the hint.

    Raises:
        UsageError: diffusers has no pipeline of this name, or cannot import it here.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        raise UsageError(
            f"diffusers {diffusers.__version__} has no pipeline {name!r}",
            measured=f"nearest names: {', '.join(near)}" if near else "",
            hint=f"truestep tiny {near[0] if near else 'FluxPipeline'} {quoted(folder)}",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls: type[Any] = getattr(diffusers, name)
    if not issubclass(cls, diffusers.DiffusionPipeline):
        needs = ", ".join(getattr(cls, "_backends", ()))
        raise UsageError(f"{name} needs packages of which one is not installed: {needs}")
    return cls


def build(cls: type[Any], *, seed: int, dtype: torch.dtype) -> Any:
    """Build a tiny random pipeline of a class, in evaluation mode, on the CPU.

    Raises:
        UsageError: A component's class has no tiny configuration.
    """
    refuse_obstacle(cls.__name__)
    with warnings.catch_warnings():  # what libraries say of their own insides
        warnings.simplefilter("ignore")
        return _built(cls, seed=seed, dtype=dtype)


def _built(cls: type[Any], *, seed: int, dtype: torch.dtype) -> Any:
    changes = EXCEPTIONS.get(cls.__name__, {})
    hints = resolved(cls)
    slots = {
        slot: kind
        for slot, parameter in parameters(cls).items()
        if (kind := _chosen(slot, parameter, hints.get(slot), changes)) is not None
    }
    facts = Facts(
        cls.__name__,
        {slot: kind.__name__ for slot, kind in slots.items()},
        shifts="calculate_shift(" in inspect.getsource(cls.__call__),
    )
    build_components(slots, changes, facts, texts(cls.__module__), Draw(seed, dtype))
    arguments: dict[str, Any] = dict(facts.built)
    for slot, parameter in parameters(cls).items():
        if slot in arguments:
            continue
        change = changes.get(slot)
        if slot in changes and not isinstance(change, Use | dict | FunctionType):
            arguments[slot] = change
        elif slot == "requires_safety_checker":
            arguments[slot] = False
        elif parameter.default is inspect.Parameter.empty and slot != "safety_checker":
            arguments[slot] = None
        elif parameter.default is inspect.Parameter.empty:
            arguments[slot] = NoChecker() if "Cosmos" in cls.__name__ else None
    return _unchecked(cls, arguments)


@dataclass(frozen=True)
class Draw:
    """What weights are drawn with, and their type."""

    seed: int
    dtype: torch.dtype


def build_components(
    slots: dict[str, type[Any]],
    changes: Mapping[str, Change],
    facts: Facts,
    sentences: tuple[str, ...],
    draw: Draw,
) -> dict[str, Any]:
    """Build components in the order in which they must agree; they are put into the facts, too."""
    _name_tokenizers(slots)
    for slot in sorted(slots, key=lambda slot: _order(slots[slot].__name__, slots[slot])):
        here = replace(facts, slot=slot)
        component = _component(slot, slots[slot], changes.get(slot), here, sentences)
        if isinstance(component, torch.nn.Module):
            randomise(component, seed=draw.seed, name=slot)
            cast(component.eval(), draw.dtype)
        facts.built[slot] = component
    return facts.built


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast in place, but for what the class keeps in float32, as `from_pretrained` does."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        if value.dtype == torch.float32 and not kept & set(key.split(".")):
            value.data = value.data.to(dtype)


def _unchecked(cls: type[Any], arguments: dict[str, Any]) -> Any:
    """Build a pipeline that insists on a safety checker: with one that lets everything pass."""
    module = inspect.getmodule(cls)
    if "safety_checker" in arguments or not hasattr(module, "CosmosSafetyChecker"):
        return cls(**arguments)
    return cls(**arguments, safety_checker=NoChecker())


def parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a class's constructor."""
    return {
        name: parameter
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def resolved(cls: type[Any]) -> dict[str, Any]:
    """The constructor's annotations as types, as far as they can be resolved."""
    try:
        return typing.get_type_hints(cls.__init__)
    except Exception:
        return {name: p.annotation for name, p in parameters(cls).items()}


def _members(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    elif isinstance(annotation, type) and annotation is not type(None):
        yield annotation


def _named(name: str) -> type[Any]:
    for library in (diffusers, transformers):
        cls = getattr(library, name, None)
        if isinstance(cls, type):
            return cls
    raise UsageError(f"neither diffusers nor transformers has the class {name}")


def chosen(annotation: Any, change: Change = None) -> type[Any] | None:
    """The class to build for an annotation, or None where there is none that can be."""
    if isinstance(change, Use):
        return _named(change.cls)
    members = [member for member in _members(annotation) if _buildable(member)]
    if not members:
        return None
    if issubclass(members[0], Enum):
        return _named(ANY)
    abstract = ABSTRACT.get(members[0].__name__)
    return _named(abstract) if abstract else members[0]


def _chosen(
    slot: str, parameter: inspect.Parameter, annotation: Any, changes: Mapping[str, Change]
) -> type[Any] | None:
    """The class to build for a constructor's argument, or None where it is none or left out."""
    change = changes.get(slot)
    if isinstance(change, Use):
        return _named(change.cls)
    if slot in changes and not isinstance(change, dict | FunctionType):
        return None
    optional = parameter.default is not inspect.Parameter.empty and slot not in NEEDED
    if optional and slot not in changes:
        return None
    return chosen(annotation)


def _buildable(member: type[Any]) -> bool:
    if member.__name__.endswith(LEFT_OUT):
        return False
    return member.__module__.startswith(("diffusers", "transformers"))


def _name_tokenizers(slots: dict[str, type[Any]]) -> None:
    """Where any tokenizer will do, choose the one that the encoder beside it is used with."""
    for slot, cls in slots.items():
        if cls.__name__ in ANY_TOKENIZER:
            encoder = slots.get(slot.replace("tokenizer", "text_encoder"))
            kind = tokenizers.tokenizer_of(encoder.__name__) if encoder else None
            slots[slot] = _named(kind or "T5Tokenizer")


def _order(name: str, cls: type[Any]) -> int:
    if name in tokenizers.TOKENIZERS or name in IMAGES or name in WITH_TOKENIZER:
        return 0
    if issubclass(cls, transformers.PreTrainedModel):
        return 1
    return 2 if name in AUTOENCODERS else 3


def _component(
    slot: str, cls: Any, change: Change, facts: Facts, sentences: tuple[str, ...]
) -> Any:
    name: str = cls.__name__
    if name in tokenizers.TOKENIZERS:
        return tokenizers.TOKENIZERS[name](sentences)
    if name in IMAGES:
        return IMAGES[name](cls)
    if name in WITH_TOKENIZER:
        kind, make = WITH_TOKENIZER[name]
        return make(cls, tokenizers.TOKENIZERS[kind](sentences))
    if isinstance(change, Use):
        settings: dict[str, Any] = change.settings or {}
    elif isinstance(change, FunctionType):
        settings = change(facts)
    else:
        settings = change if isinstance(change, dict) else {}
    if issubclass(cls, transformers.PreTrainedModel):
        return cls(configuration(cls.config_class, _tokenizer_of(slot, facts), settings))
    if name in AUTOENCODERS:
        return cls(**{**AUTOENCODERS[name], **settings})
    if name in DENOISERS:
        return cls(**{**DENOISERS[name](facts), **settings})
    if issubclass(cls, diffusers.SchedulerMixin):
        return cls(**{**SCHEDULERS.get(name, {}), **_shifting(cls, facts), **settings})
    if not issubclass(cls, torch.nn.Module) and all(
        parameter.default is not inspect.Parameter.empty for parameter in parameters(cls).values()
    ):
        return cls(**settings)  # guiders and normalisers, at their defaults
    raise UsageError(
        f"no tiny configuration is known for the class {name}",
        where=f"{facts.pipeline}, component {slot}",
    )


def _tokenizer_of(slot: str, facts: Facts) -> Any:
    """The tokenizer or processor whose ids a text encoder will be given."""
    if "text_encoder" in slot:
        for name in (slot.replace("text_encoder", "tokenizer"), "tokenizer", "processor"):
            if name in facts.built:
                return facts.built[name]
    return None


def _shifting(cls: type[Any], facts: Facts) -> dict[str, Any]:
    """Pipelines that compute a shift from the resolution get a scheduler that uses it."""
    if facts.shifts and "use_dynamic_shifting" in parameters(cls):
        return {"use_dynamic_shifting": True}
    return {}

"""The next higher precision, and a model converted to it leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from truestep.floors import EPSILON
from truestep.measure.plain import is_wrapped
from truestep.runtime.lent import Lender, lendable, lending
from truestep.runtime.weight import Lent, cast

HIGHER = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
"""Next higher precision to measure a working dtype's own rounding against."""

FLOAT32_AT_MOST = frozenset({"CosmosLearnablePositionalEmbed", "Linear4bit"})
"""Classes whose code refuses float64 (`vector_norm(..., dtype=torch.float32)`) or unpacks it wrong
(bitsandbytes 0.50): they stay in float32, and give what the modules after them take."""


def working_dtype(model: Any) -> torch.dtype | None:
    """Dtype that rounds most of those that a model's weights compute in; None without any.

    Models keep some weights wider than the rest: embeddings, norms, tables of modulation. What is
    stored in 8 bits is computed in another dtype, and says nothing where there are others.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found: dict[torch.dtype, None] = {}
    for module in modules:
        used = next((dtype for _, name, dtype in _casting(module) if name == "compute_dtype"), None)
        weights = [w for w in module._parameters.values() if w is not None]
        found |= dict.fromkeys(used or weight.dtype for weight in weights)
    found = {dtype: None for dtype in found if dtype.is_floating_point}
    computed = [dtype for dtype in found if dtype.itemsize > 1] or list(found)
    return max(computed, key=lambda dtype: torch.finfo(dtype).eps, default=None)


@contextmanager
def converted(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Make narrower floating-point parameters and buffers of a module wider, for a while.

    Small ones are copied; large ones are widened whenever they are used (see `truestep.runtime.
    lent`), so that no model is held twice. A quantised weight of a module of PyTorch's own is
    written out then; one of another module, which has code of its own for it, stays. Layerwise
    casting of diffusers casts to the wider dtype.
    On leaving, every one is what it was, also where hooks that offload have put others there.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    narrow: dict[int, tuple[torch.Tensor, bool]] = {}
    places: list[tuple[dict[str, Any], str, Any]] = []
    packed: list[tuple[dict[str, Any], str, Any]] = []
    hooks: list[tuple[Any, str, Any]] = []
    for module in modules:
        if dtype is torch.float64 and type(module).__name__ in FLOAT32_AT_MOST:
            continue
        hooks += _casting(module)
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in both:
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if is_packed(tensor):
                    if type(module).__module__.startswith("torch.nn."):
                        packed.append((held, name, tensor))
                    continue
                if tensor.itemsize < dtype.itemsize:
                    seen = narrow.get(id(tensor), (tensor, True))[1]
                    narrow[id(tensor)] = (tensor, seen and lendable(module, tensor, dtype))
                    places.append((held, name, tensor))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    lends = bool(packed) or any(lent for _, lent in narrow.values())
    with ExitStack() as stack:
        if lends:
            lender = stack.enter_context(lending())
        try:
            for hook, name, _ in hooks:
                setattr(hook, name, dtype)
            for tensor, lent in narrow.values():
                data = tensor.data
                kept.append((tensor, data))
                tensor.data = _lent(lender, data, dtype) if lent else data.to(dtype)
            for held, name, tensor in packed:
                held[name] = torch.nn.Parameter(_written_out(lender, tensor, dtype), False)
            yield
        finally:
            for tensor, data in reversed(kept):
                tensor.data = data
            for held, name, tensor in (*places, *packed):
                held[name] = tensor
            for hook, name, value in hooks:
                setattr(hook, name, value)
            if lends:
                lender.forget()


def _casting(module: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """What a module casts its weights to: (object, attribute, dtype). Layerwise casting of
    diffusers says it in a hook, a module that holds quantised weights (GGUF, 4 bits) itself."""
    own = vars(module).get("compute_dtype")
    if isinstance(own, torch.dtype) and own.is_floating_point:
        return [(module, "compute_dtype", own)]
    registry = getattr(module, "_diffusers_hook", None)
    hook = getattr(registry, "hooks", {}).get("layerwise_casting")
    names = ("storage_dtype", "compute_dtype") if hook is not None else ()
    return [(hook, name, getattr(hook, name)) for name in names]


def _lent(lender: Lender, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    lent = lender.lent(data)
    return lender.lend(cast(lent or data, dtype, data.device, lender.buffers))


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a weight is quantised by a class of its own, which says what its numbers are."""
    return is_wrapped(tensor) and type(tensor).dequantize is not torch.Tensor.dequantize


def _written_out(lender: Lender, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What stands in for a quantised weight: its numbers, made whenever it is used."""

    def write(into: torch.Tensor, start: int, stop: int) -> None:
        into.copy_(tensor.dequantize().reshape(-1)[start:stop])

    like = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return lender.lend(Lent(like, tensor.device, write))


def raised_precision(dtype: str) -> str | None:
    """Precision that a working dtype is raised to for a second look; None for 32 bits and more."""
    return HIGHER[dtype] if EPSILON[dtype] > EPSILON["float32"] else None

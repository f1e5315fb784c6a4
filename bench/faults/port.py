"""The corpus's faults, planted in another implementation of the same model.

The port (`examples/parity/wan_port`) shares no names and no fused tensors with diffusers' model.
Faults of weights are planted in diffusers' model, whose weights the port is then given; the others
are written again for the port's own modules. Places stay in diffusers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from bench.faults.entry import Fault
from bench.faults.places import ATTENTIONS, LINEARS
from bench.faults.precision import _rounds_output_to
from bench.faults.registry import FAULTS
from bench.faults.state import _previous_output, _residual_kept
from bench.faults.targets import (
    models,
    narrowed,
    on_input,
    on_output,
    replace_forward,
    with_attention,
)
from bench.faults.transformer import _returns_input
from examples.parity.wan_port import model as code
from examples.parity.wan_port.port import use

__all__ = ["PORTED", "WITHOUT", "ported_fault"]

Tensor = torch.Tensor

OF_WEIGHTS = (
    "norm-affine-lost",
    "modulation-without-one",
    "output-shift-scale-swapped",
    "heads-exchanged",
    "attention-bias-dropped",
    "feed-forward-bias-dropped",
    "weight-scaled",
    "blocks-exchanged",
    "weights-in-float8",
    "weights-in-float8-unscaled",
    "weights-in-int8",
    *(name for name, entry in FAULTS.items() if entry.family == "checkpoint"),
)
"""Faults of nothing but parameters: they come over with the weights."""

WITHOUT = {
    name: reason
    for names, reason in (
        (
            ("text-in-bfloat16", "guidance-in-bfloat16"),
            "acts around the transformer, which is the same code for the port",
        ),
    )
    for name in names
}
"""Entries of the mirrored families without a meaning in the port, and why."""


@dataclass(frozen=True)
class Mirror:
    """A fault written for the port: changes one port of a pipeline."""

    change: Callable[[Any, Any], None]
    where: tuple[str, ...] | None = None


_MIRRORS: dict[str, Mirror] = {}

ROPE = ("rope", "(root)")
"""The port turns by angles that its own forward computes: no module answers to `rope`."""

SINUSOIDS = ("condition_embedder.timesteps_proj", "condition_embedder")
"""Likewise the sinusoids of the timestep."""


def _mirror(*where: str) -> Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]:
    """Register `change(pipe, port)` under its name; `where` only if it is not the entry's own."""

    def mark(change: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        _MIRRORS[change.__name__.replace("_", "-")] = Mirror(change, where or None)
        return change

    return mark


def ported_fault(name: str) -> Fault:
    """An entry as it is in the port: applied to a pipeline of diffusers' models."""
    entry, mirror = FAULTS[name], _MIRRORS.get(name)

    def apply(pipe: Any) -> None:
        if mirror is None:
            entry.apply(pipe)
            use(pipe)
            return
        use(pipe)
        for port in models(pipe):
            mirror.change(pipe, port)

    where = mirror.where if mirror is not None and mirror.where else entry.where
    return replace(entry, apply=apply, where=where, subjects=frozenset({"wan"}))


def _middle(port: Any) -> Any:
    return port.layers[len(port.layers) // 2]


# Norms and activations


@_mirror()
def norm_epsilon(pipe: Any, port: Any) -> None:
    for module in port.modules():
        if isinstance(vars(module).get("eps"), float):
            module.eps *= 10


@_mirror()
def qk_norm_missing(pipe: Any, port: Any) -> None:
    on_output(_middle(port).self_attn.q_norm, _returns_input)
    on_output(_middle(port).self_attn.k_norm, _returns_input)


@_mirror()
def k_norm_missing(pipe: Any, port: Any) -> None:
    on_output(_middle(port).self_attn.k_norm, _returns_input)


@_mirror()
def qk_norm_per_head(pipe: Any, port: Any) -> None:
    def change_for(heads: int) -> Any:
        def change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            split = args[0].unflatten(-1, (heads, -1))
            normed = functional.rms_norm(split, split.shape[-1:], eps=module.eps)
            made: Tensor = normed.flatten(-2) * module.scale
            return made

        return change

    for layer in port.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            on_output(norm, change_for(layer.self_attn.heads))


@_mirror("{block}.ffn.net.0", "{block}.ffn")
def gelu_exact(pipe: Any, port: Any) -> None:
    # The port's activation stands apart from the layer before it: `ffn.net.0` is not one module.
    for layer in port.layers:
        layer.mlp.act.approximate = "none"


@_mirror()
def text_projection_gelu_exact(pipe: Any, port: Any) -> None:
    port.text_mlp.act.approximate = "none"


# Positions


def _with(port: Any, name: str, change: Callable[..., Tensor]) -> None:
    """Replace a function of the port's file by `change(original, *args)` in one forward."""

    def forward(_: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        function = getattr(code, name)
        setattr(code, name, lambda *inner: change(function, *inner))
        try:
            return original(*args, **kwargs)
        finally:
            setattr(code, name, function)

    replace_forward(port, forward)


def _angles(
    sizes: Sequence[int], head: int, place: Callable[[int, Tensor], Tensor], base: float = 10_000.0
) -> Tensor:
    """As `rotary_angles`, at other positions or of another base."""
    side = head // 6
    parts = []
    for axis, pairs in enumerate((head // 2 - 2 * side, side, side)):
        rates = base ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        rows = place(axis, torch.arange(sizes[axis])).double()
        shape = [1, 1, 1, pairs]
        shape[axis] = sizes[axis]
        parts.append((rows[:, None] * rates).view(shape).expand(*sizes, pairs))
    return torch.cat(parts, dim=-1).flatten(0, 2)


@_mirror(*ROPE)
def rope_first_frame_apart(pipe: Any, port: Any) -> None:
    def apart(axis: int, rows: Tensor) -> Tensor:
        return rows + (rows > 0) if axis == 0 else rows

    _with(port, "rotary_angles", lambda _, sizes, head: _angles(sizes, head, apart))


@_mirror(*ROPE)
def rope_reversed(pipe: Any, port: Any) -> None:
    def reverse(axis: int, rows: Tensor) -> Tensor:
        return rows.flip(0) if axis == 2 else rows

    _with(port, "rotary_angles", lambda _, sizes, head: _angles(sizes, head, reverse))


@_mirror(*ROPE)
def rope_theta(pipe: Any, port: Any) -> None:
    def same(axis: int, rows: Tensor) -> Tensor:
        return rows

    _with(port, "rotary_angles", lambda _, sizes, head: _angles(sizes, head, same, 9000.0))


@_mirror(*ROPE)
def rope_axes_swapped(pipe: Any, port: Any) -> None:
    def swapped(original: Callable[..., Tensor], sizes: list[int], head: int) -> Tensor:
        side = head // 6
        t, h, w = original(sizes, head).split([head // 2 - 2 * side, side, side], dim=-1)
        return torch.cat([t, w, h], dim=-1)

    _with(port, "rotary_angles", swapped)


@_mirror(*ROPE)
def rope_in_bfloat16(pipe: Any, port: Any) -> None:
    def low(original: Callable[..., Tensor], sizes: list[int], head: int) -> Tensor:
        angles = original(sizes, head)
        cos, sin = (narrowed(part, torch.bfloat16) for part in (angles.cos(), angles.sin()))
        return torch.atan2(sin, cos)

    _with(port, "rotary_angles", low)


@_mirror("{block}.attn1")
def rope_pairs_half_apart(pipe: Any, port: Any) -> None:
    def half_apart(original: Callable[..., Tensor], x: Tensor, angles: Tensor, heads: int) -> Any:
        together = x.unflatten(-1, (heads, 2, -1)).transpose(-1, -2).flatten(-3)
        turned = original(together, angles, heads)
        return turned.unflatten(-1, (heads, -1, 2)).transpose(-1, -2).flatten(-3)

    _with(port, "_turned", half_apart)


@_mirror("{middle}.attn1")
def rope_missing_on_queries(pipe: Any, port: Any) -> None:
    def forward(module: Any, original: Any, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = module.qkv(x).chunk(3, dim=-1)
        k = code._turned(module.k_norm(k), angles, module.heads)
        made: Tensor = module.out(code._attend(module.q_norm(q), k, v, module.heads))
        return made

    replace_forward(_middle(port).self_attn, forward)


# Modulation


def _reordered(port: Any, order: Sequence[int]) -> None:
    layer, wanted = _middle(port), list(order)

    def reorder(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, text, time, *rest = args
        return (x, text, time[..., wanted, :], *rest)

    layer.modulation.data.copy_(layer.modulation.data[wanted].clone())
    on_input(layer, reorder)


@_mirror()
def shift_scale_swapped(pipe: Any, port: Any) -> None:
    _reordered(port, (1, 0, 2, 3, 4, 5))


@_mirror()
def gates_exchanged(pipe: Any, port: Any) -> None:
    _reordered(port, (0, 1, 5, 3, 4, 2))


@_mirror()
def modulation_reused(pipe: Any, port: Any) -> None:
    _reordered(port, (0, 1, 2, 0, 1, 2))


@_mirror()
def gate_missing(pipe: Any, port: Any) -> None:
    def opened(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, text, time, *rest = args
        time = time.clone()
        time[..., 2, :] = 0
        return (x, text, time, *rest)

    _middle(port).modulation.data[2] = 1
    on_input(_middle(port), opened)


@_mirror()
def modulation_in_bfloat16(pipe: Any, port: Any) -> None:
    def low(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, text, time, *rest = args
        table = module.modulation
        total = narrowed(table + time.to(table.dtype), torch.bfloat16)
        return (x, text, total - table, *rest)

    for layer in port.layers:
        on_input(layer, low)


@_mirror(*SINUSOIDS)
def time_sin_cos_flipped(pipe: Any, port: Any) -> None:
    def flipped(original: Callable[..., Tensor], timestep: Tensor, width: int) -> Tensor:
        return original(timestep, width).roll(width // 2, dims=-1)

    _with(port, "sinusoids", flipped)


@_mirror(*SINUSOIDS)
def sinusoids_in_bfloat16(pipe: Any, port: Any) -> None:
    _with(port, "sinusoids", lambda original, *args: narrowed(original(*args), torch.bfloat16))


# Attention


def _scaled(port: Any, factor: float) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query * factor, key, value)

    for layer in port.layers:
        with_attention(layer.self_attn, attend)


@_mirror("{block}.attn1")
def attention_scale_head_size(pipe: Any, port: Any) -> None:
    size = port.config.attention_head_dim
    _scaled(port, (size / (size + 1)) ** 0.5)


@_mirror("{block}.attn1")
def attention_scale_larger(pipe: Any, port: Any) -> None:
    _scaled(port, 1.02)


@_mirror()
def text_padding_masked(pipe: Any, port: Any) -> None:
    seen: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        real = kwargs["encoder_hidden_states"].ne(0).any(dim=-1)
        first = torch.arange(real.shape[1], device=real.device) == 0
        seen[:] = [(real | first)[:, None, None]]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[0])

    port.register_forward_pre_hook(note, with_kwargs=True)
    for layer in port.layers:
        with_attention(layer.cross, attend)


@_mirror(*ATTENTIONS)
def softmax_in_bfloat16(pipe: Any, port: Any) -> None:
    FAULTS["softmax-in-bfloat16"].apply(_Only(port))


@_mirror(*ATTENTIONS)
def attention_in_int8(pipe: Any, port: Any) -> None:
    FAULTS["attention-in-int8"].apply(_Only(port))


@dataclass(frozen=True)
class _Only:
    """What entries that look at nothing but the transformer need of a pipeline."""

    transformer: Any


# Precision


@_mirror("patch_embedding", *LINEARS)
def linears_in_bfloat16(pipe: Any, port: Any) -> None:
    # Patches enter the port through a linear layer too.
    FAULTS["linears-in-bfloat16"].apply(_Only(port))


@_mirror()
def time_embedding_in_bfloat16(pipe: Any, port: Any) -> None:
    FAULTS["linears-in-bfloat16"].apply(_Only(port.time_mlp))


@_mirror()
def block_output_in_float16(pipe: Any, port: Any) -> None:
    on_output(_middle(port), _rounds_output_to(torch.float16))


@_mirror()
def block_output_in_bfloat16(pipe: Any, port: Any) -> None:
    on_output(_middle(port), _rounds_output_to(torch.bfloat16))


@_mirror()
def norms_in_bfloat16(pipe: Any, port: Any) -> None:
    for module in port.modules():
        if isinstance(module, code.Standardise):
            on_output(module, _rounds_output_to(torch.bfloat16))


@_mirror()
def residual_in_bfloat16(pipe: Any, port: Any) -> None:
    def low(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (narrowed(args[0], torch.bfloat16), *args[1:])

    on_input(_middle(port), low)
    on_output(_middle(port), _rounds_output_to(torch.bfloat16))


# Blocks


@_mirror()
def block_dropped(pipe: Any, port: Any) -> None:
    on_output(_middle(port), _returns_input)


@_mirror()
def block_repeated(pipe: Any, port: Any) -> None:
    on_output(_middle(port), lambda module, args, output: module.forward(output, *args[1:]))


# State


@_mirror()
def branches_share_residual(pipe: Any, port: Any) -> None:
    _residual_kept(pipe, _middle(port))


@_mirror()
def attention_buffer_reused(pipe: Any, port: Any) -> None:
    _previous_output(pipe, _middle(port).self_attn)


assert set(OF_WEIGHTS).isdisjoint(_MIRRORS)

PORTED: dict[str, Fault] = {
    name: ported_fault(name) for name in FAULTS if name in _MIRRORS or name in OF_WEIGHTS
}
"""Entries by name, as they are in the port."""

"""What the stages of a joint audio-video model hand on: the parts of a value, by modality.

A recording holds the video part under the plain name (`step/0007/cond`), the audio part under
`audio/` and that name, and a text's mask beside it (`text/mask/cond`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

AUDIO = "audio/"
"""What the audio part of a value has before its name in a recording."""


class Joint(NamedTuple):
    """A latent, prediction or decoded clip: `video` and `audio`."""

    video: torch.Tensor
    audio: torch.Tensor


class Encoded(NamedTuple):
    """A text encoder's states `b l c`, all layers side by side, and mask `b l` (1 for a token)."""

    embeds: torch.Tensor
    mask: torch.Tensor


class Context(NamedTuple):
    """A text as the transformer is given it: `b l c` a modality, and one mask `b l` for both."""

    video: torch.Tensor
    audio: torch.Tensor
    mask: torch.Tensor


Value = Any
"""A tensor, or a `Joint`, `Encoded` or `Context` of tensors."""


def each(change: Callable[..., torch.Tensor], *values: Value) -> Value:
    """A function of tensors, applied part by part to values of one kind."""
    first = values[0]
    if not isinstance(first, tuple):
        return change(*values)
    return type(first)(*(change(*parts) for parts in zip(*values, strict=True)))


def tensors_of(value: Value) -> tuple[torch.Tensor, ...]:
    """The tensors of a value, in order."""
    return tuple(value) if isinstance(value, tuple) else (value,)


def made_of(tensors: Iterable[torch.Tensor], *, like: Value) -> Value:
    """A value of the same kind as another from its tensors."""
    return type(like)(*tensors) if isinstance(like, tuple) else next(iter(tensors))


def floating(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, leaving out tensors that are not of floating point (masks)."""
    return lambda part: change(part) if part.is_floating_point() else part


def parts(name: str, value: Value) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a value, each under its name in a recording."""
    if not isinstance(value, tuple):
        yield name, value
        return
    for field, part in zip(value._fields, value, strict=True):  # type: ignore[attr-defined]
        yield _part_name(name, field), part


def gather(tensors: Mapping[str, torch.Tensor], name: str) -> Value:
    """The value of a name, with all its parts.

    Raises:
        KeyError: There is no tensor of this name.
    """
    plain = tensors[name]
    audio, mask = (tensors.get(_part_name(name, field)) for field in ("audio", "mask"))
    if audio is not None:
        return Joint(plain, audio) if mask is None else Context(plain, audio, mask)
    return plain if mask is None else Encoded(plain, mask)


def _part_name(name: str, field: str) -> str:
    if field == "audio":
        return AUDIO + name
    if field == "mask":
        head, _, last = name.rpartition("/")
        return f"{head}/mask/{last}"
    return name

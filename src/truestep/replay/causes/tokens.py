"""Hypotheses about the ids and masks that text encoders and models are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from truestep.replay.causes.guesses import Guess
from truestep.replay.causes.material import Handed

Tensor = torch.Tensor

MATCHED = 2
"""A template must leave so many times as many tokens of the prompts as it has itself."""


def masks(scene: Handed) -> Iterator[Guess]:
    """A mask of zeros and ones in another form; no number is left open."""
    if scene.keys[0].side != "in" or not scene.same_sizes:
        return
    if not all(_is_mask(side) for one in scene.failing for side in (one.actual, one.reference)):
        return
    what = f"the mask {scene.argument}"
    changes: Sequence[tuple[str, Callable[[Tensor], Tensor]]] = (
        ("is inverted", lambda m: 1 - m),
        ("is 1 everywhere: padding is not masked", torch.ones_like),
        ("is 0 everywhere", torch.zeros_like),
        ("leaves out the last token that the reference's keeps", lambda m: m * _moved(m, -1)),
        ("leaves out the last token before the padding", lambda m: m * m.roll(-1, -1)),
        ("leaves out the first token that the reference's keeps", lambda m: m * _moved(m, 1)),
        ("keeps one token more at the end", lambda m: torch.maximum(m, _moved(m, 1))),
        ("keeps one token more at the beginning", lambda m: torch.maximum(m, _moved(m, -1))),
        ("is moved on by one token", lambda m: _moved(m, 1)),
        ("is moved back by one token", lambda m: _moved(m, -1)),
        ("is moved on by one token, round its end", lambda m: m.roll(1, -1)),
        ("is moved back by one token, round its end", lambda m: m.roll(-1, -1)),
        ("runs the other way: padding is on the other side", lambda m: m.flip(-1)),
    )
    for text, change in changes:
        yield Guess("mask", f"{what} {text}", [change(one.reference) for one in scene.failing])
    if scene.failing[0].reference.shape[0] > 1:
        made = [one.reference.flip(0) for one in scene.failing]
        yield Guess("mask", f"{what} is that of the other prompt", made)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and tensor.numel() > 1 and bool(((tensor == 0) | (tensor == 1)).all())


def _moved(mask: Tensor, places: int) -> Tensor:
    """Moved along its last axis, with zeros behind."""
    moved = mask.roll(places, -1).clone()
    moved[..., 0 if places > 0 else -1] = 0
    return moved


@dataclass(frozen=True)
class _Ids:
    """One failing call's ids.

    Attributes:
        actual, reference: Of its only row.
        pads: Ids that the reference is padded with.
    """

    actual: list[int]
    reference: list[int]
    pads: frozenset[int]

    @property
    def pad(self) -> int:
        """What it is padded with."""
        return self.reference[-1] if self.reference[-1] in self.pads else next(iter(self.pads))

    def content(self, ids: Sequence[int]) -> list[int]:
        """Ids without the padding around them."""
        kept = list(ids)
        while kept and kept[-1] in self.pads:
            kept.pop()
        while kept and kept[0] in self.pads:
            kept.pop(0)
        return kept

    def padded(self, ids: Sequence[int], *, left: bool = False) -> list[int]:
        """Ids filled up to the candidate's length, or cut off at it."""
        size = len(self.actual)
        fill = [self.pad] * max(size - len(ids), 0)
        return [*fill, *ids][:size] if left else [*ids, *fill][:size]


def tokens(scene: Handed) -> Iterator[Guess]:
    """Ids in a template, padded, cut off or moved otherwise."""
    rows = _rows(scene)
    if rows is None:
        return
    what = scene.argument

    def guess(kind: str, text: str, change: Callable[[_Ids], list[int]]) -> Guess:
        made = [torch.tensor([change(one)], dtype=torch.float64) for one in rows]
        shaped = [
            m.reshape(m.shape[1:] if o.actual.dim() == 1 else m.shape)
            for m, o in zip(made, scene.failing, strict=True)
        ]
        return Guess(kind, f"{what} {text}", shaped)

    size, before = len(rows[0].actual), len(rows[0].reference)
    if size < before:
        text = f"is cut off at {size} tokens, the reference's has {before}"
        yield guess("text length", text, lambda one: one.reference[: len(one.actual)])
        yield guess("text length", f"lacks the first {before - size}", _ends)
    elif size > before:
        text = f"has {size} tokens, the reference's {before}: it is padded further"
        yield guess("text length", text, lambda one: one.padded(one.reference))
    else:
        other = "the reference's on the other side"
        yield guess("text padding", f"is padded on the left, {other}", _left)
        yield guess("text padding", f"is padded on the right, {other}", _right)
        yield from _other_pad(rows, guess, scene)
    yield guess("text template", "lacks its last token", _without_last)
    yield guess("text template", "lacks its first token", _without_first)
    yield from _templates(rows, guess, scene)


def _without_last(one: _Ids) -> list[int]:
    return one.padded(one.content(one.reference)[:-1])


def _without_first(one: _Ids) -> list[int]:
    return one.padded(one.content(one.reference)[1:])


def _left(one: _Ids) -> list[int]:
    return one.padded(one.content(one.reference), left=True)


def _right(one: _Ids) -> list[int]:
    return one.padded(one.content(one.reference))


def _ends(one: _Ids) -> list[int]:
    return one.reference[len(one.reference) - len(one.actual) :]


_Make = Callable[[str, str, Callable[[_Ids], list[int]]], Guess]


def _rows(scene: Handed) -> list[_Ids] | None:
    """The ids of every failing call; None of anything else."""
    if scene.keys[0].side != "in" or "ids" not in scene.keys[0].path[0]:
        return None
    rows = []
    pads = _pads(scene)
    for one in scene.failing:
        sides = [side.reshape(-1, side.shape[-1]) for side in (one.actual, one.reference)]
        if any(len(side) != 1 or not bool((side == side.round()).all()) for side in sides):
            return None
        actual, reference = ([int(value) for value in side[0].tolist()] for side in sides)
        own = pads | ({reference[-1]} if reference[-2:-1] == reference[-1:] else set())
        if not own:
            return None
        rows.append(_Ids(actual, reference, frozenset(own)))
    return rows


def _tokenizers(scene: Handed) -> Iterator[Any]:
    for part in scene.material.components.values():
        if hasattr(part, "pad_token_id") and hasattr(part, "padding_side"):
            yield part


def _pads(scene: Handed) -> frozenset[int]:
    """The padding id of the tokenizer that belongs to the encoder."""
    number = scene.keys[0].component.removeprefix("text_encoder")
    part = scene.material.components.get(f"tokenizer{number}")
    pad = getattr(part, "pad_token_id", None)
    return frozenset({pad} if isinstance(pad, int) else ())


def _other_pad(rows: Sequence[_Ids], guess: _Make, scene: Handed) -> Iterator[Guess]:
    """Padded with another id, one that a tokenizer knows as special."""
    known: dict[int, str] = {0: "0", 1: "1"}
    for part in _tokenizers(scene):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
            value = getattr(part, name, None)
            if isinstance(value, int):
                known[value] = f"{value}, {name.removesuffix('_token_id')}"
    theirs = rows[0].pad
    for value, name in known.items():
        if value == theirs:
            continue

        def padded(one: _Ids, value: int = value) -> list[int]:
            kept = one.content(one.reference)
            at = 0 if one.reference[: len(kept)] == kept else len(one.reference) - len(kept)
            return [
                token if at <= place < at + len(kept) else value
                for place, token in enumerate(one.reference)
            ]

        yield guess("text padding", f"is padded with {name}, the reference's with {theirs}", padded)


def _templates(rows: Sequence[_Ids], guess: _Make, scene: Handed) -> Iterator[Guess]:
    """The prompts with other text before or behind them, the same for every prompt."""
    for kept in (0, 1):  # the beginning of the text stays before a template
        for end in (0, 1):  # and its end behind it
            found = _around(rows[0], kept, end)
            if found is None:
                continue
            before, behind = found
            if behind and len(rows[0].content(rows[0].reference)) == len(rows[0].reference):
                continue  # the reference's is full: what is behind may have been cut off
            total = sum(len(one.content(one.reference)) for one in rows)
            if total < MATCHED * (len(before) + len(behind)):
                continue

            parts = [f"{_text(scene, before)} before" if before else ""]
            parts += [f"{_text(scene, behind)} behind" if behind else ""]
            said = " and ".join(part for part in parts if part)
            yield guess(
                "text template",
                f"has {said} the prompt's own tokens",
                partial(_wrapped, kept, end, before, behind),
            )


def _wrapped(
    kept: int, end: int, before: Sequence[int], behind: Sequence[int], one: _Ids
) -> list[int]:
    """The reference's ids with others around them."""
    ids = one.content(one.reference)
    last = len(ids) - end
    return one.padded([*ids[:kept], *before, *ids[kept:last], *behind, *ids[last:]])


def _around(one: _Ids, kept: int, end: int) -> tuple[list[int], list[int]] | None:
    """What stands before and behind the reference's own ids, in the candidate's."""
    mine, theirs = one.content(one.actual), one.content(one.reference)
    inner = theirs[kept : len(theirs) - end]
    if mine[:kept] != theirs[:kept] or (end and mine[-1:] != theirs[-1:]) or len(inner) < 2:
        return None
    left = mine[kept : len(mine) - end]
    for at in range(len(left) - len(inner) + 1):
        if left[at : at + len(inner)] == inner and (at or len(left) > len(inner)):
            return left[:at], left[at + len(inner) :]
    return None


def _text(scene: Handed, ids: Sequence[int]) -> str:
    """Ids as the encoder's tokenizer reads them."""
    number = scene.keys[0].component.removeprefix("text_encoder")
    part = scene.material.components.get(f"tokenizer{number}")
    decode = getattr(part, "decode", None)
    text = str(decode(list(ids))).strip() if callable(decode) else ""
    return f"`{text[:60]}` ({len(ids)} tokens)" if text else f"{len(ids)} tokens"

"""Judge two LoRA files: what each adapter adds is the same, however it is named, scaled or split.

An adapter adds alpha / rank * up @ down. Formats differ in names (Kohya's have no dots), in whether
alpha is a tensor or multiplied into one of the matrices, and in whether a fused projection has one
adapter or one for each part, with copies of `down`. Pure: no I/O.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from truestep.judge.parameters import Codes, judged_pair
from truestep.judge.rows import one_sided, row_fields
from truestep.keys import Address
from truestep.measure.distance import same_bits
from truestep.measure.plain import plain
from truestep.measure.rounding import called, rounding
from truestep.pairing.content import fit
from truestep.pairing.fused import describe
from truestep.pairing.state import AGREEMENT
from truestep.verdict import Row, Verdict

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]

_MATRIX = re.compile(
    r"^(?P<stem>.+?)[._](?P<part>lora_down|lora_A|lora\.down|lora_linear_layer\.down|"
    r"lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.(?!weight)[^.]+)?\.weight$"
)
_DOWN = ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")
_AROUND = re.compile(
    r"^(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|unet\.|text_encoder(?:_\d)?\.|"
    r"lora_(?:unet|transformer|te\d?|text_encoder\d?)_)+"
)
"""What formats write before the name of a module."""

_ENCODER = re.compile(r"(?:text_encoder|te)_?(?P<number>\d?)[._]$")

GAIN = 0.05
"""How far the best factor between two matrices may be from one that alphas explain, for this one to
be what they are judged by."""


@dataclass(frozen=True)
class Adapter:
    """Names of an adapter's tensors, and alpha / rank."""

    stem: str
    down: str
    up: str
    alpha: str | None
    scale: float

    @property
    def plain_stem(self) -> str:
        """The module's name without what formats write around it, dots as underscores."""
        return _AROUND.sub("", self.stem).replace(".", "_")

    @property
    def encoder(self) -> int:
        """Which text encoder the module is of, from 1 on; 0 where it is of none."""
        around = _AROUND.match(self.stem)
        found = _ENCODER.search(around[0]) if around else None
        return int(found["number"] or 1) if found else 0


def adapters(tensors: Tensors) -> list[Adapter]:
    """All adapters of a file: every pair of matrices, with its alpha where there is one."""
    parts: dict[str, dict[bool, str]] = {}
    for name in tensors:
        match = _MATRIX.match(name)
        if match:
            parts.setdefault(match["stem"], {})[match["part"] in _DOWN] = name
    found = []
    for stem, names in parts.items():
        if len(names) < 2:
            continue
        alpha = f"{stem}.alpha" if f"{stem}.alpha" in tensors else None
        rank = max(len(tensors[names[True]]), 1) if tensors[names[True]].ndim else 1
        scale = float(tensors[alpha].reshape(-1)[0]) / rank if alpha else 1.0
        found.append(Adapter(stem, names[True], names[False], alpha, scale))
    return found


def are_adapters(tensors: Tensors) -> bool:
    """Whether most names of a file are those of adapters."""
    held = sum(2 + (adapter.alpha is not None) for adapter in adapters(tensors))
    return 2 * held > len(tensors)


@dataclass(frozen=True)
class _Pair:
    """An adapter, and the rows of the reference's `up` that it stands for."""

    own: Adapter
    other: Adapter
    rows: slice


def compare_adapters(actual: Tensors, reference: Tensors) -> tuple[list[Row], tuple[str, ...]]:
    """Judge every adapter of two files.

    Returns:
        Rows in the reference's order, and notes: where alpha was taken to be the rank.
    """
    own, others = adapters(actual), adapters(reference)
    pairs = list(_paired(own, others, actual, reference))
    used = {id(pair.own) for pair in pairs}
    elsewhere = _elsewhere(pairs, reference)
    rows: list[Row] = []
    for other in others:
        mine = sorted((p for p in pairs if p.other is other), key=lambda p: p.rows.start)
        for pair in mine:
            judged = list(_judged(pair, actual, reference))
            note = elsewhere.get(pair.own.stem)
            rows += [_misplaced(row, note) if note else row for row in judged]
        rows += _uncovered(other, mine, reference)
    seen = {name for each in others for name in (each.down, each.up, each.alpha)}
    for adapter in own:
        if id(adapter) not in used:
            rows += [_row(name, actual[name], None) for name in (adapter.down, adapter.up)]
    known = {name for each in own for name in (each.down, each.up, each.alpha)}
    rest = [name for name in reference if name not in seen]
    for name in [*rest, *(n for n in actual if n not in known and n not in rest)]:
        rows.append(_row(name, actual.get(name), reference.get(name)))
    silent = sum(adapter.alpha is None for adapter in own), sum(a.alpha is None for a in others)
    notes = [
        f"{count} adapters of the {side} side have no alpha: taken as their rank"
        for count, side in zip(silent, ("actual", "reference"), strict=True)
        if count
    ]
    return rows, tuple(notes)


def _paired(
    own: Iterable[Adapter], others: list[Adapter], actual: Tensors, reference: Tensors
) -> Iterator[_Pair]:
    """Adapters of one module: by its name, or by what they hold."""
    named = {(other.encoder, other.plain_stem): other for other in others}
    alone = Counter(other.plain_stem for other in others)
    anywhere = {other.plain_stem: other for other in others if alone[other.plain_stem] == 1}
    for adapter in own:
        stem = adapter.plain_stem
        known = named.get((adapter.encoder, stem)) or anywhere.get(stem)
        candidates = [*([known] if known else []), *(o for o in others if o is not known)]
        up, down = actual[adapter.up], actual[adapter.down]
        for other in candidates:
            if other is known and reference[other.up].shape == up.shape:
                yield _Pair(adapter, other, slice(0, len(up)))
                break
            rows = _within(up, down, reference[other.up], reference[other.down])
            if rows is not None:
                yield _Pair(adapter, other, rows)
                break


def _within(up: Tensor, down: Tensor, whole: Tensor, other: Tensor) -> slice | None:
    """Rows of a larger `up` that one is, where the two `down` are of one direction."""
    alike = down.shape == other.shape and up.ndim > 1 and up.shape[1:] == whole.shape[1:]
    if not alike or not 0 < len(up) <= len(whole) or fit(down, other) is None:
        return None
    first = up[0].reshape(-1).to(torch.float64)
    flat = whole.reshape(len(whole), -1).to(torch.float64)
    size = flat.norm(dim=1) * first.norm()
    cosine = (flat @ first) / size.clamp_min(1e-300)
    for start in torch.nonzero(cosine > 0.999).flatten().tolist():
        if start + len(up) <= len(whole) and fit(up, whole[start : start + len(up)]) is not None:
            return slice(start, start + len(up))
    return None


def _elsewhere(pairs: Iterable[_Pair], reference: Tensors) -> dict[str, str]:
    """Stems of adapters that lie in a fused one otherwise than in other layers, and what is there.

    Where as many layers say one thing as another, all of them: one is wrong.
    """
    kinds: dict[object, list[_Pair]] = {}
    for pair in pairs:
        names = (re.sub(r"\d+", "*", each.stem) for each in (pair.own, pair.other))
        kinds.setdefault((*names, reference[pair.other.up].shape), []).append(pair)
    found = {}
    for members in kinds.values():
        places = Counter((pair.rows.start, pair.rows.stop) for pair in members)
        usual, count = places.most_common(1)[0]
        settled = count >= max(AGREEMENT * len(members), 2)
        for pair in members:
            own = pair.rows.start, pair.rows.stop
            if own != usual or (not settled and len(places) > 1):
                other = usual if own != usual else next(p for p in places if p != own)
                found[pair.own.stem] = f"in other layers it is at [{other[0]}:{other[1]}]"
    return found


def _misplaced(row: Row, note: str) -> Row:
    verdict = Verdict.DRIFTED if row.verdict.passed else row.verdict
    return row.model_copy(update={"verdict": verdict, "note": f"{note}; {row.note}"})


def _judged(pair: _Pair, actual: Tensors, reference: Tensors) -> Iterator[Row]:
    """Rows of both matrices, and of the factor where it is another one."""
    wanted = pair.other.scale / pair.own.scale if pair.own.scale else math.inf
    whole = reference[pair.other.up]
    part = whole if pair.rows == slice(0, len(whole)) else whole[pair.rows]
    name = pair.other.up
    if part is not whole:
        name = f"{name} [{describe(range(pair.rows.start, pair.rows.stop))}]"
    given = 1.0
    for label, mine, theirs, at in (
        (pair.other.down, pair.own.down, reference[pair.other.down], pair.own.down),
        (name, pair.own.up, part, pair.own.up),
    ):
        a, r = plain(actual[mine], mine), plain(theirs, label)
        factor, found = _factored(a, r, wanted)
        given *= factor
        notes = [
            found.get("note", ""),
            f"x {factor:.6g}" if factor != 1.0 else "",
            f"in actual: {at}" if at != label else "",
        ]
        note = "; ".join(text for text in notes if text)
        yield Row(**row_fields(label, a, r, Address()), **{**found, "note": note})
    if not math.isclose(given, wanted, rel_tol=1e-6):
        note = (
            f"the adapter adds {given / wanted:.6g} times what the reference's does: alpha / rank "
            f"is {pair.own.scale:.6g} (was {pair.other.scale:.6g}), and the matrices are "
            f"x {given:.6g}"
        )
        yield Row(name=f"{pair.other.stem}.alpha", verdict=Verdict.DRIFTED, note=note)


def _factored(a: Tensor, r: Tensor, wanted: float) -> tuple[float, dict[str, Any]]:
    """The factor between two matrices, of those that alphas explain, and how they are judged."""
    plainly = judged_pair(Codes(a), Codes(r))
    if plainly["verdict"].passed or a.shape != r.shape or plainly["verdict"] is Verdict.INVALID:
        return 1.0, plainly
    hit = fit(a.to(torch.float32), r.to(torch.float32))
    factors = [wanted, math.sqrt(wanted)] if 0 < wanted < math.inf else []
    factor = next((f for f in factors if hit and abs(hit.scale / f - 1) < GAIN), 1.0)
    if factor == 1.0:
        return 1.0, plainly
    meant = (r.to(torch.float32) * factor).to(a.dtype)
    exact = same_bits(a, meant)
    unit = torch.tensor(factor, dtype=torch.float64)
    off = 0 if exact else rounding(a, r, None, unit=unit).off
    if off:
        note = f"{off:,} of {a.numel():,} elements are not the nearest {called(a.dtype)}"
        return factor, {"verdict": Verdict.DRIFTED, "note": note}
    note = f"rounded to {called(a.dtype)} with alpha / rank in it"
    fields = {"verdict": Verdict.EQUIVALENT, "ratio": 0.0, "ratio_metric": "rel_l2", "note": note}
    return factor, fields


def _uncovered(other: Adapter, pairs: list[_Pair], reference: Tensors) -> Iterator[Row]:
    """Rows of an adapter that no other stands for, or two do."""
    at, count = 0, len(reference[other.up])
    if not pairs:
        for name in (other.down, other.up):
            yield _row(name, None, reference[name])
        return
    for pair in pairs:
        if pair.rows.start < at:
            name = f"{other.up} [{describe(range(pair.rows.start, pair.rows.stop))}]"
            note = f"{pair.own.up} is another adapter of the same rows"
            yield Row(name=name, verdict=Verdict.INCOMPARABLE, note=note)
        elif pair.rows.start > at:
            yield _gap(other, at, pair.rows.start, reference)
        at = max(at, pair.rows.stop)
    if at < count:
        yield _gap(other, at, count, reference)


def _gap(other: Adapter, start: int, stop: int, reference: Tensors) -> Row:
    name = f"{other.up} [{describe(range(start, stop))}]"
    return _row(name, None, reference[other.up][start:stop])


def _row(name: str, actual: Tensor | None, reference: Tensor | None) -> Row:
    """A tensor by itself: judged, or what one side lacks."""
    a, r = (None if tensor is None else plain(tensor, name) for tensor in (actual, reference))
    fields = row_fields(name, a, r, Address())
    if a is None or r is None:
        return Row(**fields, **one_sided(a))
    return Row(**fields, **judged_pair(Codes(a), Codes(r)))

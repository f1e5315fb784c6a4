"""Judge two checkpoints of one model: paired by what they hold, whatever it is called.

Names that both sides have are judged as `truestep.judge.parameters` does. Of others, the pairs come
from `truestep.pairing`: equal rows, fused or split or laid out anew, or the place in the model.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.judge.adapters import are_adapters, compare_adapters
from truestep.judge.packed import Weights, info_of, judged_blocks
from truestep.judge.parameters import Codes, compare_parameters, judged_pair, summed
from truestep.judge.rows import build_comparison, one_sided, place_fields, row_fields
from truestep.keys import Address
from truestep.measure.plain import NO_PAGES, Pages, plain
from truestep.measure.rounding import expanded
from truestep.pairing.content import arranged
from truestep.pairing.order import against_names, mark_misplaced, reversed_lists
from truestep.pairing.parameters import matched, pair_parameters
from truestep.pairing.records import Ambiguous, Evidence
from truestep.pairing.rows import Hashed, hashed
from truestep.pairing.scales import BESIDE, Numbers, scale_of
from truestep.pairing.state import Chosen, Match, State, Unit
from truestep.pairing.structure import ambiguous, called_unit
from truestep.recording import readers
from truestep.recording.readers import Source, side_of
from truestep.text import quoted
from truestep.verdict import Comparison, Row, Verdict

ALIKE = 0.9
"""Share of equal names of the smaller side from which on names decide."""

LAID_OUT = "laid out anew: {how}; right where the code that loads them expects it"


def compare_weights(
    actual: object,
    reference: object,
    *,
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> Comparison:
    """Judge two checkpoints, pairing what has other names by content and by place.

    Args:
        actual: What was converted: a file, a folder of sharded weights or its index, or a mapping
            from name to tensor.
        reference: What it was made of, likewise.
        rename: Actual names to reference names, of modules or parameters, `*` for one part.
        ignore: Patterns of names, of either side, that are left out and said to be.

    Returns:
        One row a parameter of the reference, or a part of one where the actual side has it in
        parts, then what only the actual side has. What is paired is judged by the rule of weights:
        bit for bit, or exact rounding (with a stored scale, over it).

    Raises:
        FileFormatError: A file cannot be read.
        UsageError: A side is a recording or holds nothing, or a pattern matches nothing.
    """
    ours, theirs = readers.load(actual, label="actual"), readers.load(reference, label="reference")
    for side in (ours, theirs):
        if side.manifest is not None:
            raise UsageError(
                "recordings are what models compute, not their weights",
                where=side.label,
                hint=_compare(ours, theirs),
            )
    left_out = set(_ignored(ours, theirs, ignore))
    own, others = (
        Chosen(side.tensors, [n for n in side.tensors if n not in left_out])
        for side in (ours, theirs)
    )
    numbers = Numbers(own), Numbers(others)
    for side, held in zip((ours, theirs), numbers, strict=True):
        if not held:
            raise UsageError("the checkpoint holds no weights", where=side.label)
    notes: tuple[str, ...] = ()
    if rename is None and are_adapters(own) and are_adapters(others):
        rows, notes = compare_adapters(own, others)
        how = f"{len(rows):,} tensors of LoRA adapters, by what they add"
    elif rename is None and set(numbers[0]) == set(numbers[1]):
        rows = _explained(compare_parameters(own, others), *numbers)
        how = f"{len(rows):,} parameters by name"
    else:
        state = pair_parameters(*numbers, rename=_said(*numbers) if rename is None else rename)
        mark_misplaced(state)
        rows = list(_rows(state, *numbers))
        how = _how(state)
        notes = (*_crossed(state), *_laid_out(state.matches), *_turned(state))
    result = build_comparison(
        rows,
        actual=side_of(ours),
        reference=side_of(theirs),
        looked_at=(how,),
        not_looked_at=_unseen(left_out, own, others),
        notes=notes,
    )
    return summed(result)


def _unseen(left_out: Iterable[str], *sides: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    count = len(set(left_out))
    beside = {name for side in sides for name in side if BESIDE.search(name)}
    words = (
        f"names to be ignored: {count:,}" if count else "",
        f"scales of activations: {len(beside):,}" if beside else "",
    )
    return tuple(word for word in words if word)


def _compare(ours: Source, theirs: Source) -> str:
    paths = [side.path for side in (ours, theirs)]
    return f"truestep compare {' '.join(quoted(str(path)) for path in paths)}" if all(paths) else ""


def _ignored(ours: Source, theirs: Source, patterns: Sequence[str]) -> list[str]:
    names = dict.fromkeys([*ours.tensors, *theirs.tensors])
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UsageError(
                f"no name matches {pattern!r}, which was to be ignored",
                measured=f"the first names are {', '.join(list(names)[:3])}",
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def _said(own: Numbers, others: Numbers) -> dict[str, str]:
    """Actual names to the reference's where nearly all are equal, or are so behind a prefix.

    Names then decide: a checkpoint is loaded by them, and one that is new says nothing of the rest.
    """
    ways = [{name: name for name in own if name in others}]
    for prefix in _prefixes(own, others):
        cut = ((n, n[len(prefix) :]) for n in own if n.startswith(prefix))
        ways.append({name: rest for name, rest in cut if rest in others})
    for prefix in _prefixes(others, own):
        ways.append({name: prefix + name for name in own if prefix + name in others})
    best = max(ways, key=len)
    return best if len(best) >= ALIKE * min(len(own), len(others)) else {}


def _prefixes(longer: Iterable[str], shorter: Numbers) -> list[str]:
    """What stands before names of one side that are the other's behind a dot; the commonest."""
    found: Counter[str] = Counter()
    for name in longer:
        for at, letter in enumerate(name):
            if letter == "." and name[at + 1 :] in shorter:
                found[name[: at + 1]] += 1
    return [prefix for prefix, _ in found.most_common(3)]


def _rows(state: State, own: Numbers, others: Numbers) -> Iterator[Row]:
    """Rows of all pairs in the reference's order, then of what has none."""
    groups, left, right = ambiguous(state)
    rows: list[Row] = []
    for name in [
        name for name in left if name in right
    ]:  # of one name, and nothing to pair them by
        a, r = _whole(name, own), _whole(name, others)
        rows.append(Row(**row_fields(name, a, r, Address()), **judged_pair(Codes(a), Codes(r))))
        left.remove(name)
        right.remove(name)
    for match in matched(state):
        rows += _of_match(match, own, others)
    for group in groups:
        rows += _interchangeable(group, state)
    order = {name: at for at, name in enumerate(others.tensors)}
    yield from sorted(rows, key=lambda row: order.get(row.name.partition(" [")[0], len(order)))
    for name in right:
        yield Row(**row_fields(name, None, _whole(name, others), Address()), **one_sided(None))
    for name in left:
        tensor = _whole(name, own)
        yield Row(**row_fields(name, tensor, None, Address()), **one_sided(tensor))


def _whole(name: str, numbers: Numbers) -> torch.Tensor:
    return plain(numbers.tensors[name.partition(" [")[0]], name)


def _of_match(match: Match, own: Numbers, others: Numbers) -> Iterator[Row]:
    if match.actual.name in own.coded or match.reference.name in others.coded:
        blocks = own.packed(match.actual.name) or others.packed(match.reference.name)
        if blocks is not None:
            yield _in_blocks(match, own, others)
            _forget_both(match, own, others)
            return
    a, r = _codes(own, match.actual), _codes(others, match.reference)
    scales = a.scale, r.scale
    both = None not in scales and a.tensor.dtype == r.tensor.dtype
    if both:
        a, r = a._replace(scale=None), r._replace(scale=None)
    shapes = a.tensor.shape, r.tensor.shape
    a, r = _arranged(a, r, match.layout)
    mapped = not (match.actual.place or match.reference.place)
    release = partial(_forget_both, match, own, others)
    found = judged_pair(a, r, Pages(release) if mapped else NO_PAGES)
    name = called_unit(match.reference)
    fields = row_fields(name, a.tensor, r.tensor, Address())
    yield Row(**fields, **_placed(match, found, layout=shapes[0] != shapes[1]))
    if both:
        yield _of_scales(match, own, others, scales)
    release()


def _placed(match: Match, found: dict[str, Any], *, layout: bool) -> dict[str, Any]:
    """What was judged, with where it lies on the actual side; drifted where that is not right."""
    parts = [
        match.note if match.misplaced else "",
        found.get("note", ""),
        match.layout if layout else "",
        f"in actual: {called_unit(match.actual)}" if match.actual != match.reference else "",
    ]
    note = "; ".join(part for part in parts if part)
    if match.misplaced and found["verdict"].passed:
        return {"verdict": Verdict.DRIFTED, "note": note}
    return {**found, "note": note}


def _in_blocks(match: Match, own: Numbers, others: Numbers) -> Row:
    """The row of a pair of which a side at least is in blocks (GGUF)."""
    sides: list[Weights] = []
    for numbers, unit in ((own, match.actual), (others, match.reference)):
        found: Weights | None = numbers.packed(unit.name)
        if found is None:
            found = numbers[unit.name] if unit.place is None else unit.place.of(numbers[unit.name])
        elif unit.place is not None:
            rows = torch.tensor(unit.place.rows)
            found = None if unit.place.axis else found.take(rows)
        if found is None:
            break
        sides.append(found)
    turned = match.layout and not match.layout.startswith("reshape")
    name = called_unit(match.reference)
    if turned or len(sides) < 2:
        note = "in blocks along another axis: convert it in its own layout to have it judged"
        judged: dict[str, Any] = {"verdict": Verdict.INCOMPARABLE, "note": note}
        return Row(name=name, **_placed(match, judged, layout=True))
    a, r = sides
    mapped = not (match.actual.place or match.reference.place)
    release = partial(_forget_both, match, own, others)
    judged = judged_blocks(a, r, Pages(release) if mapped else NO_PAGES)
    fields = place_fields(name, info_of(a), info_of(r), Address())
    return Row(**fields, **_placed(match, judged, layout=tuple(a.shape) != tuple(r.shape)))


def _of_scales(match: Match, own: Numbers, others: Numbers, scales: Sequence[Any]) -> Row:
    """The stored scales of codes that both sides keep."""
    name = others.scales[match.reference.name]
    if match.reference.place is not None:
        name = f"{name} [{match.reference.place}]"
    a, r = (torch.empty(0) if scale == (None,) else scale[0] for scale in scales)
    fields = row_fields(name, a, r, Address())
    return Row(**fields, **judged_pair(Codes(a), Codes(r)))


def _forget_both(match: Match, own: Numbers, others: Numbers) -> None:
    own.release(match.actual.name)
    others.release(match.reference.name)


def _codes(numbers: Numbers, unit: Unit) -> Codes:
    """A unit as it is stored, and its scale."""
    tensor = plain(numbers.tensors[unit.name], unit.name)
    stored = numbers.scales.get(unit.name)
    scale = None if stored is None else (scale_of(unit.name, stored, numbers.tensors),)
    if unit.place is None:
        return Codes(tensor, scale)
    if scale is not None and scale[0] is not None and scale[0].ndim:
        scale = (unit.place.of(expanded(scale[0], tensor.shape)),)
    return Codes(unit.place.of(tensor), scale)


def _arranged(a: Codes, r: Codes, layout: str) -> tuple[Codes, Codes]:
    """Both in one layout, with their scales where these are not one number."""
    if not layout and a.tensor.shape == r.tensor.shape:
        return a, r
    own, theirs = arranged(a.tensor, r.tensor, layout)
    full, other = (_full(codes) for codes in (a, r))
    mine, others = arranged(
        a.tensor if full is None else full, r.tensor if other is None else other, layout
    )
    return (
        Codes(own, a.scale if full is None else (mine,)),
        Codes(theirs, r.scale if other is None else (others,)),
    )


def _full(codes: Codes) -> torch.Tensor | None:
    """A scale of each element, where there is more than one scale."""
    scale = codes.scale[0] if codes.scale else None
    if scale is None or not scale.ndim:
        return None
    return expanded(scale, codes.tensor.shape)


def _interchangeable(group: Ambiguous, state: State) -> Iterator[Row]:
    """Rows of tensors that hold the same: any may be any, so long as there are as many."""
    words = f"one of {len(group.reference)} that hold the same ({group.why})"
    for own, theirs in zip(group.actual, group.reference, strict=False):
        a, r = (
            _whole(name, numbers)
            for name, numbers in ((own, state.actual), (theirs, state.reference))
            if isinstance(numbers, Numbers)
        )
        found = judged_pair(Codes(a.reshape(r.shape)), Codes(r))
        note = f"{words}; {found['note']}" if found.get("note") else words
        yield Row(**row_fields(theirs, a, r, Address()), **{**found, "note": note})
    for name in group.reference[len(group.actual) :]:
        assert isinstance(state.reference, Numbers)
        tensor = _whole(name, state.reference)
        yield Row(**row_fields(name, None, tensor, Address()), **one_sided(None))
    for name in group.actual[len(group.reference) :]:
        assert isinstance(state.actual, Numbers)
        tensor = _whole(name, state.actual)
        yield Row(**row_fields(name, tensor, None, Address()), **one_sided(tensor))


def _how(state: State) -> str:
    """Why parameters are pairs, counted."""
    by = Counter(
        "by name"
        if match.evidence in (Evidence.NAME, Evidence.RENAME)
        else "by their place"
        if match.evidence in (Evidence.STRUCTURE, Evidence.EXCLUSION)
        else "by content"
        for match in state.matches
    )
    return f"{len(state.matches):,} parameters: {', '.join(f'{n:,} {w}' for w, n in by.items())}"


def _laid_out(matches: Iterable[Match]) -> tuple[str, ...]:
    how: Counter[str] = Counter()
    for match in matches:
        if match.actual.place or match.reference.place:
            how["as parts of a tensor, or with its rows in another order"] += 1
        elif match.layout.startswith("reshape"):
            how["reshaped"] += 1
        elif match.layout:
            how["with axes in another order"] += 1
    if not how:
        return ()
    return (LAID_OUT.format(how=", ".join(f"{count:,} {word}" for word, count in how.items())),)


def _crossed(state: State) -> tuple[str, ...]:
    told = against_names(state)
    if not told:
        return ()
    more = f", and {len(told) - 3} more" if len(told) > 3 else ""
    return (f"names say otherwise, content cannot: {'; '.join(told[:3])}{more}",)


def _turned(state: State) -> tuple[str, ...]:
    """Lists of layers that the two sides number from opposite ends."""
    return tuple(
        f"layers of {own} are those of {theirs} from the other end: right where the code that "
        "loads them expects it"
        for own, theirs in reversed_lists(state)
    )


def _explained(rows: list[Row], own: Numbers, others: Numbers) -> list[Row]:
    """Rows of one name whose content is another's say whose."""
    wrong = {row.name for row in rows if row.verdict is Verdict.DRIFTED and row.name in others}
    if not wrong:
        return rows
    sizes = {others.stored(name).numel() for name in wrong}
    theirs: dict[int, list[str]] = {}
    for name in others:
        if others.stored(name).numel() in sizes and (rows_of := _hash(others, name)) is not None:
            theirs.setdefault(rows_of.whole, []).append(name)
    told = []
    for row in rows:
        found = _hash(own, row.name) if row.name in wrong else None
        names = [name for name in theirs.get(found.whole, ()) if name != row.name] if found else []
        if names:
            note = f"it holds the content of {names[0]}; {row.note}"
            row = row.model_copy(update={"note": note})
        told.append(row)
    return told


def _hash(numbers: Numbers, name: str) -> Hashed | None:
    return hashed(numbers, name, None)

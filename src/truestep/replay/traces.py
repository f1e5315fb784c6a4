"""Compare two traces: which module made the error, which passed it on, and how it grew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from truestep.environment import Environment
from truestep.errors import UsageError
from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.compare import rows_by_level
from truestep.judge.divergence import ROOT, with_kind
from truestep.judge.floor import Limits, pair_of
from truestep.judge.growth import Inside, inside, introduced, origins
from truestep.judge.rows import build_comparison, one_value
from truestep.judge.sentence import with_divergence
from truestep.keys import address, key_of
from truestep.many import Texts
from truestep.measure.distance import distance
from truestep.recording import readers as sources
from truestep.recording.columns import Table
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.readers import Source, side_of
from truestep.replay.isolation import alike, laid_out
from truestep.replay.trace_ends import (
    INPUTS,
    cut,
    gone,
    is_partial,
    only_of_the,
    unrecorded,
    with_ends,
)
from truestep.replay.trace_names import (
    Named,
    Names,
    exchange,
    fqns,
    match_inputs,
    name_modules,
    table_of,
)
from truestep.text import listed
from truestep.verdict import GIVEN, Comparison, Difference, Divergence, Row, Rows, Verdict

FEW = 16
"""So many elements, one for every sample, are timesteps and no latent."""


class Streamed(Mapping[str, torch.Tensor]):
    """Tensors of a recording that are forgotten when the next one is read, names mapped.

    Args:
        tensors: What is read from; pages of a recording go back to the system.
        names: Name here to name there, in order.
        prefixes: What stands before both names of what is stored of each: `stats/`.
        shapes: Shapes to lay some of them out in, by name here; see `isolation.laid_out`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        *,
        prefixes: Sequence[str] = ("",),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._tensors, self._names, self._prefixes = tensors, names, prefixes
        self._shapes = shapes or {}
        self._last: str | None = None

    def laid_out(self, shapes: Mapping[str, tuple[int, ...]]) -> Streamed:
        """The same with some tensors in other shapes."""
        return Streamed(self._tensors, self._names, prefixes=self._prefixes, shapes=shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored(name)
        if stored is None:
            raise KeyError(name)
        if self._last not in (None, stored) and isinstance(self._tensors, Recording):
            self._tensors.release(str(self._last))
        self._last = stored
        tensor = self._tensors[stored]
        if name not in self._shapes:
            return tensor
        view = laid_out(tensor, torch.empty(self._shapes[name], device="meta"))
        return tensor if view is None else view

    def moments(self, name: str) -> tuple[float, ...]:
        """Moments that were kept of a tensor; see `Recording.moments`."""
        if isinstance(self._tensors, Recording):
            return self._tensors.moments(self._names[name])
        return tuple(self[f"stats/{name}"].tolist())

    def _stored(self, name: str) -> str | None:
        for prefix in self._prefixes:
            if name.startswith(prefix) and (inner := name[len(prefix) :]) in self._names:
                return prefix + self._names[inner]
        return None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored(name) is not None

    def __iter__(self) -> Iterator[str]:
        return (prefix + name for name in self._names for prefix in self._prefixes)

    def __len__(self) -> int:
        return len(self._names) * len(self._prefixes)


def compare_traces(
    actual: str | Path | Recording,
    reference: str | Path | Recording,
    *,
    rename: Mapping[str, str] | None = None,
    noise: Iterable[str | Path | Recording] = (),
    tolerance: float | None = None,
) -> Comparison:
    """Compare two traces of the same input, module by module in the reference's order.

    A trace is of a free run: what a module was given is what the modules before it made. An output
    that is further over its floor than everything that went into it was *introduced* in that
    module, any other failing one was *inherited*. Record both with `inputs` to tell the two apart
    in modules beside each other; record at level `full` for the kind of the error.

    Args:
        actual, reference: Files or recordings from `capture` or `truestep trace`.
        rename: Names of the actual side's modules to the reference's, `*` for one part. Without it,
            where the two share no name, modules are paired by what they return, and the evidence is
            noted.
        noise: Further traces of the trusted model under harmless changes: the measured floor.
        tolerance: Judge rel_l2 by this limit instead.

    Returns:
        One row a tensor; steps, branches and inputs that only one side recorded are not looked at,
        which is said. `first_divergence` is the first module that introduced an error.

    Raises:
        FileFormatError: A file is damaged.
        UsageError: A side is no trace, or the two have no step and branch in common.
    """
    ours, theirs = (
        _loaded(side, label) for side, label in ((actual, "actual"), (reference, "reference"))
    )
    names = (_modules(ours), _modules(theirs))
    named = name_modules(ours, theirs, names, rename)
    sides, left_out = _paired(ours, theirs, names, named)
    runs = [_noise_run(side, sides[1]) for side in noise]
    stored = _manifest(theirs).noise_floor
    runs = [*(stored.runs if stored else ()), *runs]
    floor = NoiseFloor(runs=tuple(runs)) if runs else None
    rows = _judged(*sides, Limits(floor, tolerance=tolerance))
    exchanged = exchange(named, rows, ours, theirs, names) if rename is None else None
    if exchanged is not None:
        named = exchanged
        sides, left_out = _paired(ours, theirs, names, named)
        rows = _judged(*sides, Limits(floor, tolerance=tolerance))
    del names
    seen = inside(rows)
    rows = gone(_settled(origins(seen.rows)), partial=is_partial(ours) or is_partial(theirs))
    rows = with_ends(rows, ours, theirs, left_out)
    result = build_comparison(
        rows,
        actual=side_of(ours),
        reference=side_of(theirs),
        environment_differences=_environment(ours, theirs),
        looked_at=(f"{len({*rows.each('fqn')})} modules", f"{len(rows)} tensors"),
        not_looked_at=(*left_out, *_unseen(seen), *unrecorded(ours, theirs)),
        notes=(*named.notes, *_undone(seen), *cut(ours, "actual"), *cut(theirs, "reference")),
        hint=_hint(rows, sides, measured=floor is not None or tolerance is not None),
    )
    return _located(result, sides, named, theirs)


def _loaded(what: str | Path | Recording, label: str) -> Source:
    source = sources.load(what, label=label)
    if source.manifest is None or not any(map(_of_module, table_of(source).each("name"))):
        raise UsageError(
            "this side is no trace: it holds no tensors of modules",
            where=source.label,
            hint="make one: truestep trace record CASE --output FILE, trace run, or capture()",
        )
    return _with_table(source, table_of(source))


def _manifest(source: Source) -> Manifest:
    """The manifest of a trace; `_loaded` made sure of it."""
    if source.manifest is None:
        raise ValueError(f"{source.label} is no recording")
    return source.manifest


def _with_table(source: Source, table: Table) -> Source:
    manifest = _manifest(source).model_copy(update={"tensors": table})
    return replace(source, manifest=manifest)


def _modules(source: Source) -> Texts:
    """Names of module tensors, as they are without a prefix for the level."""
    names = Texts()
    for name in filter(_of_module, table_of(source).each("name")):
        names.append(name)
    return names


def _of_module(name: str) -> bool:
    return key_of(name).stage == "module"


# --- names -----------------------------------------------------------------------------------


def _paired(
    ours: Source, theirs: Source, names: tuple[Texts, Texts], named: Named
) -> tuple[tuple[Source, Source], tuple[str, ...]]:
    """Both sides under the reference's names, as far as both recorded the place; and what is not.

    Raises:
        UsageError: They have no step and branch in common.
    """
    own = Names((new, old) for old in names[0] if (new := named.name(old)) is not None)
    own = match_inputs(own, ours, theirs)
    kept = Names.unchanged(names[1])
    scope, left_out = _scope(own, kept)
    if left_out:
        own, kept = (Names((n, o) for n, o in side.pairs() if scope(n)) for side in (own, kept))
    if not kept or not own:
        raise UsageError(
            "the two traces have nothing in common",
            measured=f"actual: {_span(names[0])}; reference: {_span(names[1])}",
            likely="other steps, branches or models were traced",
            hint="see what a trace holds: truestep show TRACE",
        )
    return (_renamed(ours, own), _renamed(theirs, kept)), left_out


def _undone(seen: Inside) -> list[str]:
    if not seen.undone:
        return []
    text = (
        f"{len(seen.undone)} tensors inside of modules that agree are other ones, which is not "
        f"judged: {listed(_labels(seen.undone))}"
    )
    return [text]


def _unseen(seen: Inside) -> list[str]:
    return [
        f"{listed(_labels(rows))} (only the {label} trace opened what is around them)"
        for label, rows in (
            ("reference", _without(seen.unseen, "actual")),
            ("actual", _without(seen.unseen, "reference")),
        )
        if rows
    ]


def _without(rows: Rows, side: str) -> Rows:
    return rows.take(at for at, info in enumerate(rows.each(side)) if info is None)


def _labels(rows: Rows) -> list[str]:
    return fqns(rows.each("name"))


def _renamed(source: Source, names: Names) -> Source:
    """A side with its tensors under the reference's names, read one at a time."""
    whole = table_of(source)
    places = (whole.names.find(old) for _, old in names.pairs())
    table = whole.take(place for place in places if place is not None)
    if table is not whole or any(new != old for new, old in names.pairs()):
        table = table.replaced(name=names)
    prefixes = {"full": ("",), "stats": ("stats/",), "sketch": ("stats/", "sketch/")}
    level = _manifest(source).level
    tensors = Streamed(source.tensors, names, prefixes=prefixes[level])
    return _with_table(replace(source, tensors=tensors), table)


# --- what is looked at -----------------------------------------------------------------------


def _scope(
    ours: Iterable[str], theirs: Iterable[str]
) -> tuple[Callable[[str], bool], tuple[str, ...]]:
    """Steps, branches and slots that both sides recorded, and what is left out, in words."""
    places = [{_place(name) for name in side} for side in (ours, theirs)]
    inputs = [any(_is_input(name) for name in side) for side in (ours, theirs)]
    common = places[0] & places[1]
    words = [
        f"{_places(only - common)} {only_of_the(label)}"
        for only, label in zip(places, ("actual", "reference"), strict=True)
        if only - common
    ]
    if inputs[0] != inputs[1]:
        words.append(f"{INPUTS} {only_of_the('actual' if inputs[0] else 'reference')}")

    def inside(name: str) -> bool:
        return _place(name) in common and (all(inputs) or not _is_input(name))

    return inside, tuple(words)


def _place(name: str) -> tuple[int, str]:
    found = address(name)
    return found.step or 0, found.branch or ""


def _is_input(name: str) -> bool:
    return key_of(name).inward


def _places(found: Iterable[tuple[int, str]]) -> str:
    ordered = sorted(found)
    return "steps " + listed([f"{step} {branch}" for step, branch in ordered])


def _span(names: Iterable[str]) -> str:
    return _places({_place(name) for name in names})


# --- rows ------------------------------------------------------------------------------------


def _judged(ours: Source, theirs: Source, limits: Limits) -> Rows:
    """Rows of both sides; a tensor that only is laid out otherwise is compared, with a note."""
    table = table_of(theirs)
    sketched = "sketch" in {_manifest(side).level for side in (ours, theirs)}
    own: dict[str, tuple[int, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in table_of(ours).each("name", "shape"):
        other = table.value(name, "shape")
        if other not in (None, shape) and _same_layout(shape, other, sketched=sketched):
            own[name], shapes[name] = shape, other
    rows = Rows.of(_rows(_laid_out(ours, shapes), theirs, limits))
    if not own:
        return rows
    changed = [_with_shape(row, own.get(row.name)) for row in rows]
    return Rows.of(changed)


def _same_layout(own: Sequence[int], other: Sequence[int], *, sketched: bool) -> bool:
    """Whether one is the other with dimensions of size 1 more or less, or its tokens in rows."""
    if sketched:  # a sketch is of the elements in their order
        return [n for n in own if n != 1] == [n for n in other if n != 1]
    return alike(*(torch.empty(tuple(shape), device="meta") for shape in (own, other)))


def _laid_out(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """A side with some tensors in other shapes."""
    if not shapes:
        return source
    table = table_of(source)
    table = table.replaced(
        shape=(shapes.get(name, shape) for name, shape in table.each("name", "shape"))
    )
    tensors = source.tensors
    if isinstance(tensors, Streamed):
        tensors = tensors.laid_out(shapes)
    return _with_table(replace(source, tensors=tensors), table)


def _with_shape(row: Row, own: tuple[int, ...] | None) -> Row:
    """A row with the shape that its actual side really has."""
    if own is None or row.actual is None or row.reference is None:
        return row
    note = f"shape {list(own)} laid out as {list(row.reference.shape)}"
    actual = row.actual.model_copy(update={"shape": own})
    notes = "; ".join(part for part in (row.note, note) if part)
    return row.model_copy(update={"actual": actual, "note": notes})


def _rows(ours: Source, theirs: Source, limits: Limits) -> Sequence[Row]:
    return rows_by_level({_manifest(s).level for s in (ours, theirs)}, ours, theirs, limits)


def _noise_run(what: str | Path | Recording, reference: Source) -> NoiseRun:
    """Distances of one more trace of the trusted model from the reference."""
    source = _loaded(what, "noise")
    if {_manifest(source).level, _manifest(reference).level} != {"full"}:
        raise UsageError(
            "a noise floor is measured on traces at level full",
            where=source.label,
            measured=f"levels {_manifest(source).level} and {_manifest(reference).level}",
            hint="leave out --noise; --tolerance judges by a number instead",
        )
    names = [n for n in reference.tensors if n in set(_modules(source))]
    own = Streamed(source.tensors, {n: n for n in names})
    rows = []
    for name in names:
        a, r = own[name], reference.tensors[name]
        if a.shape != r.shape or not r.numel() or not r.is_floating_point():
            continue
        found = distance(a, r)
        peak = found.max_abs / found.rms_reference if found.rms_reference else found.max_abs
        rows.append(RunMetrics(name=name, rel_l2=found.rel_l2, max_abs=peak))
    dtype = _working(source)
    return NoiseRun(
        kind="trace", detail=source.label, pair=pair_of(dtype, dtype), tensors=tuple(rows)
    )


def _working(source: Source) -> str:
    floats = [e.dtype for e in _manifest(source).tensors if "float" in e.dtype]
    return max(set(floats), key=floats.count) if floats else "float32"


def _settled(rows: Rows) -> Rows:
    """Without a measured floor, an error that no module introduced may be grown rounding."""
    floors = list(rows.having(Verdict.DRIFTED).each("floor"))
    if not floors or "introduced" in rows.each("origin") or None in floors:
        return rows
    if any(floor.source != "analytic" for floor in floors):
        return rows
    grown = "over the analytic floor, but no module adds much at once: it may be grown rounding"
    told, notes = rows.each("verdict"), rows.each("verdict", "note")
    return rows.replaced(
        verdict=(Verdict.INCONCLUSIVE if v is Verdict.DRIFTED else v for v in told),
        note=(grown if v is Verdict.DRIFTED else note for v, note in notes),
    )


def _located(
    result: Comparison, sides: tuple[Source, Source], named: Named, theirs: Source
) -> Comparison:
    places = introduced(result.rows)
    if not places:
        if result.first_divergence is None or result.first_divergence.stage == "run":
            return result  # nothing, or an end that came early
        kind = "grown by and by: no module adds much more than it was given"
        first = result.first_divergence.model_copy(update={"kind": kind})
        return with_divergence(result, first, ())
    name = places[0].name
    first = with_kind(places[0], *(side.tensors.get(name) for side in sides))
    first = _schedule(result.rows, first, sides) or first
    given = any(_is_input(of) for of, fqn in result.rows.each("name", "fqn") if fqn == first.fqn)
    alone = ""
    if named.others and not given:
        alone = named.alone_before(first.fqn or "", fqns(_modules(theirs)))
    if alone:
        kind = f"or in {alone} before it, which has no partner"
        first = first.model_copy(update={"kind": f"{kind}; {first.kind}" if first.kind else kind})
    notes = []
    own = next((a for a, r in named.partners.items() if r == first.fqn), first.fqn)
    if own != first.fqn:
        notes.append(f"`{first.fqn}` is `{own}` in the actual trace")
    least = any(_manifest(side).level == "stats" for side in sides)  # of which nothing follows
    if len(places) > 1 and not least:
        others = listed([place.fqn or "" for place in places[1:]])
        notes.append(f"further errors are introduced in {others}")
    result = result.model_copy(update={"notes": (*result.notes, *notes)})
    return with_divergence(result, first, ())


def _schedule(rows: Rows, first: Divergence, sides: tuple[Source, Source]) -> Divergence | None:
    """A timestep that the model is given wrongly, before all else that it is: the rest follows.

    A timestep is what holds one value, or few, where the whole model is given another input.
    """
    if first.fqn != ROOT or not (first.kind or "").startswith(GIVEN):
        return None
    spot = (ROOT, first.step, first.branch)
    places = enumerate(rows.each("fqn", "step", "branch"))
    for row in rows.take(at for at, place in places if place == spot):
        if row.verdict.passed or not _is_input(row.name) or row.reference is None:
            continue
        kept = [side.tensors.get(row.name) for side in sides]
        constant = all(t is not None and (t.numel() == 1 or one_value(t)) for t in kept)
        if not constant and math.prod(row.reference.shape) > FEW:
            continue
        kind = f"{GIVEN}: `{row.name.rpartition('/')[2]}`"
        if constant:
            values = [tensor.reshape(-1)[0].item() for tensor in kept if tensor is not None]
            kind += f" is {values[0]:.7g} (was {values[1]:.7g})"
        return first.model_copy(update={"name": row.name, "kind": kind})
    return None


def _hint(rows: Rows, sides: tuple[Source, Source], *, measured: bool) -> str:
    verdicts = set(rows.each("verdict"))
    if measured or all(verdict.passed for verdict in verdicts):
        return ""
    stats = any(_manifest(side).level == "stats" for side in sides)
    if stats and Verdict.DRIFTED not in verdicts:
        return "record both traces with --level sketch: of moments alone, sameness does not follow"
    return "measure the floor: --noise TRACE of the trusted model, run with other threads or again"


def _environment(ours: Source, theirs: Source) -> tuple[Difference, ...]:
    return Environment(_manifest(ours).environment).differences(_manifest(theirs).environment)

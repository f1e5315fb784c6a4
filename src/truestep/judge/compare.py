"""`truestep.compare`: judge two sets of tensors, whatever they come in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from truestep.content import case_differences
from truestep.environment import Environment
from truestep.errors import UsageError
from truestep.judge.divergence import GREW, traced_back, with_growth
from truestep.judge.estimates import moment_rows, sketch_rows, sketch_rule
from truestep.judge.floor import Limits, pair_of
from truestep.judge.key_frames import key_frame_media
from truestep.judge.latent import LATENT, SIGNATURE, check_latent
from truestep.judge.media_files import NONE, MediaOptions, compare_media
from truestep.judge.parameters import are_parameters, compare_parameters, summed
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.judge.seen import with_seen
from truestep.measure.sound import sample_rate_of
from truestep.recording import readers as sources
from truestep.recording.clips import is_media
from truestep.recording.manifest import LEFT_OUT, Manifest
from truestep.recording.readers import Source, side_of
from truestep.text import quoted
from truestep.verdict import Comparison, Difference, Row, Verdict

_UNDER_TEST = ("model", "revision", "dtype")
"""Keys of a case that two recordings may differ in and still be compared: a port's own folder, and
its working precision, which has a floor of its own."""

_NOT_SKETCHED = (
    "largest element, smaller half and structure of the differences (a side is at level sketch)"
)


def compare(
    actual: object,
    reference: object,
    *,
    tolerance: float | None = None,
    weights: bool | None = None,
    media: MediaOptions = NONE,
) -> Comparison:
    """Judge two sides' tensors; every tensor of both is accounted for.

    Args:
        actual: A path (.safetensors, .npy, .npz, .pt), a `Recording`, a tensor or array, or a
            mapping of them; or a path of media, see `truestep.judge.media_files`.
        reference: Likewise. A recording's own measured noise floor judges; otherwise the analytic
            default for the dtypes does, and the result says so. Where either side is at level
            `sketch`, distances are estimates, and judged with their error. Against a latent bundle
            (truestep's or FastVideo's) this is `check_latent`.
        tolerance: Judge rel_l2 by this limit instead.
        weights: Whether the tensors are parameters, which agree bit for bit or by exact rounding,
            or what a model computed, which agrees within a noise floor. By default their names
            say so; recordings are never parameters.
        media: Other runs to place a difference of media among.

    Returns:
        The comparison. Between recordings of different cases it is `incomparable`.

    Raises:
        FileFormatError: A file cannot be read.
        UsageError: A side is not something to compare.
    """
    if is_media(actual) or is_media(reference):
        return _of_media(actual, reference, media, judged=(tolerance, weights) != (None, None))
    media.refuse()
    ours = sources.load(actual, label="actual")
    theirs = sources.load(reference, label="reference")
    if SIGNATURE in theirs.tensors and LATENT in theirs.tensors:
        return _noted(check_latent(actual, reference, tolerance=tolerance), ours, theirs)
    ours_manifest, theirs_manifest = ours.manifest, theirs.manifest
    if _weights(ours, theirs, weights, tolerance):
        return _of_parameters(ours, theirs, guessed=weights is None)
    differences: tuple[Difference, ...] = ()
    environment: tuple[Difference, ...] = ()
    floor, pair = None, None
    if theirs_manifest is not None:
        floor = theirs_manifest.noise_floor
    if ours_manifest is not None and theirs_manifest is not None:
        found = _case_differences(ours_manifest, theirs_manifest)
        differences = tuple(d for d in found if d.key not in _UNDER_TEST)
        environment = tuple(d for d in found if d.key in _UNDER_TEST) + Environment(
            ours_manifest.environment
        ).differences(theirs_manifest.environment)
        pair = _pair(ours_manifest, theirs_manifest)
        differences += _rate_differences(ours_manifest, theirs_manifest)
    limits = Limits(floor, pair, tolerance)
    levels = {manifest.level for manifest in (ours_manifest, theirs_manifest) if manifest}
    rows = rows_by_level(levels, ours, theirs, limits)
    before = len(rows)
    rows = _kept_by_both(rows, ours_manifest, theirs_manifest)
    left_out = before - len(rows)
    if ours_manifest is not None and theirs_manifest is not None:
        rows = _of_two_runs(rows, theirs_manifest, grows=tolerance is None)
    estimated = "sketch" in levels and "stats" not in levels
    result = build_comparison(
        rows,
        actual=side_of(ours),
        reference=side_of(theirs),
        case_id=theirs_manifest.case_id if theirs_manifest else None,
        case=theirs_manifest.case if theirs_manifest else None,
        case_differences=differences,
        environment_differences=environment,
        sample_rate=sample_rate_of(theirs_manifest.settings) if theirs_manifest else None,
        looked_at=(f"{len(rows)} tensors by name",),
        not_looked_at=(
            *([_NOT_SKETCHED] if estimated else []),
            *([f"{left_out} tensors that a side left out (--keep all)"] if left_out else []),
        ),
    )
    media_shown, said = key_frame_media(ours_manifest, theirs_manifest)
    result = result.model_copy(update={"media": media_shown, "notes": (*result.notes, *said)})
    if not levels - {"full"}:
        result = with_seen(result, ours.tensors, theirs.tensors)
    return _noted(_told(result, estimated=estimated), ours, theirs)


_SPACES = (
    "one side's latent is in the space of its VAE and the other's may not be: undo the VAE's mean "
    "and std (latents_mean, latents_std or scaling_factor of its config) before they are compared"
)


def _noted(result: Comparison, ours: Source, theirs: Source) -> Comparison:
    """A result with what is to be said of files that other engines wrote."""
    notes = [*result.notes, *dict.fromkeys((*ours.notes, *theirs.notes))]
    if ours.space != theirs.space and not result.verdict.passed:
        notes.append(_SPACES)
    return result.model_copy(update={"notes": tuple(notes)}) if notes else result


def rows_by_level(levels: Set[str], ours: Source, theirs: Source, limits: Limits) -> Sequence[Row]:
    """Rows by what both recordings keep, of their levels."""
    if "stats" in levels:
        return moment_rows(ours, theirs, limits=limits)
    if "sketch" in levels:
        return sketch_rows(ours, theirs, limits=limits)
    return compare_tensors(ours.tensors, theirs.tensors, limits=limits)


def _of_media(
    actual: object, reference: object, media: MediaOptions, *, judged: bool
) -> Comparison:
    if not isinstance(actual, str | Path) or not isinstance(reference, str | Path):
        raise UsageError("media are compared with media: give two paths")
    if judged:
        raise UsageError(
            "media are judged without a tolerance, and not as weights",
            hint="drop both",
        )
    return compare_media(Path(actual), Path(reference), options=media)


def _told(result: Comparison, *, estimated: bool) -> Comparison:
    """A result with the rule that judged it, and what decides where it is undecided."""
    hint = result.hint
    if result.verdict is Verdict.INCONCLUSIVE and any(GREW in row.note for row in result.rows):
        hint = "replay the change on recorded inputs: truestep check CASE --apply FILE.py:FUNCTION"
    elif result.verdict is Verdict.INCONCLUSIVE and estimated:
        hint = "record it whole: truestep record CASE --level full --output FILE"
    rule = sketch_rule(result.rows) if estimated else result.rule
    return result.model_copy(update={"rule": rule, "hint": hint})


def _kept_by_both(
    rows: Sequence[Row], ours: Manifest | None, theirs: Manifest | None
) -> Sequence[Row]:
    """Rows without tensors of one side that the other one made, too, and left out."""
    without_ours, without_theirs = _left_out(ours), _left_out(theirs)
    if not (without_ours or without_theirs):
        return rows
    return [
        row
        for row in rows
        if not (row.actual is None and row.name in without_ours)
        and not (row.reference is None and row.name in without_theirs)
    ]


def _left_out(manifest: Manifest | None) -> frozenset[str]:
    names = manifest.settings.get(LEFT_OUT) if manifest is not None else None
    return frozenset(map(str, names)) if isinstance(names, list | tuple) else frozenset()


def _of_two_runs(rows: Sequence[Row], manifest: Manifest, *, grows: bool) -> list[Row]:
    """Rows of two whole runs: which began it, and, by a floor, what may be rounding that grew."""
    rows = _placed(rows, manifest)
    return traced_back(with_growth(rows, _given(rows, manifest)) if grows else rows)


def _placed(rows: Sequence[Row], manifest: Manifest) -> Sequence[Row]:
    """Rows of recorded calls with the stage, step and branch that their table says."""
    if not manifest.calls:
        return rows
    places = {entry.name: entry for entry in manifest.tensors}
    return [
        row.model_copy(update={"stage": at.kind, "step": at.step, "branch": at.branch})
        if (at := places.get(row.name)) and not row.stage
        else row
        for row in rows
    ]


def _given(rows: Sequence[Row], manifest: Manifest) -> dict[str, float]:
    """How far off the furthest is of what components were given until they gave each tensor.

    Until then, and not then alone: schedulers and models keep things from call to call.
    """
    errors = {row.name: row.metrics.rel_l2 for row in rows if row.metrics and row.verdict.passed}
    largest: dict[str, float] = {}
    given: dict[str, float] = {}
    for call in manifest.calls:
        names = [*_tensors(list(call.arguments.values()))]
        largest[call.component] = max(
            [largest.get(call.component, 0.0), *(errors.get(name, 0.0) for name in names)]
        )
        if call.component in ("run", "random"):
            continue  # no component: what they give is made of everything
        for name in _tensors([call.output, *call.written.values(), *call.state.values()]):
            given.setdefault(name, largest[call.component])
    return given


def _tensors(tree: Any) -> Iterator[str]:
    """Names of the tensors in trees of calls; see `truestep.calls.values`."""
    if isinstance(tree, list):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        name = next((tree[tag] for tag in ("tensor", "array", "image") if tag in tree), None)
        if isinstance(name, str):
            yield name
        else:
            yield from _tensors(list(tree.values()))


def _weights(ours: Source, theirs: Source, weights: bool | None, tolerance: float | None) -> bool:
    """Whether both sides are to be judged as parameters."""
    recorded = ours.manifest is not None or theirs.manifest is not None
    if weights and (recorded or tolerance is not None):
        raise UsageError(
            "weights are judged bit by bit",
            measured="a side is a recording"
            if recorded
            else f"tolerance = {tolerance:g} was given",
            hint="leave out weights",
        )
    if weights is not None:
        return weights
    names = (*ours.tensors, *theirs.tensors)
    return not recorded and tolerance is None and are_parameters(names)


def _of_parameters(ours: Source, theirs: Source, *, guessed: bool) -> Comparison:
    rows = compare_parameters(ours.tensors, theirs.tensors)
    result = summed(
        build_comparison(
            rows,
            actual=side_of(ours),
            reference=side_of(theirs),
            looked_at=(f"{len(rows)} parameters by name",),
        )
    )
    if result.verdict.passed or not guessed or not (ours.path and theirs.path):
        return result
    sides = " ".join(quoted(str(side.path)) for side in (ours, theirs))
    if result.missing or result.unexpected:
        note = "the two sides call parameters otherwise; they can be paired by what they hold"
        hint = f"truestep weights {sides}"
        return result.model_copy(update={"notes": (*result.notes, note), "hint": hint})
    note = "the names are those of parameters; if a model computed these tensors, say so"
    hint = f"truestep compare --activations {sides}"
    return result.model_copy(update={"notes": (*result.notes, note), "hint": hint})


def _case_differences(ours: Manifest, theirs: Manifest) -> tuple[Difference, ...]:
    if ours.case is None or theirs.case is None:
        return ()
    return case_differences(ours.case, theirs.case)


def _rate_differences(ours: Manifest, theirs: Manifest) -> tuple[Difference, ...]:
    """Sounds of two sample rates are not those of one case, even of equal lengths."""
    own, other = sample_rate_of(ours.settings), sample_rate_of(theirs.settings)
    if own is None or other is None or own == other:
        return ()
    return (Difference(key="sample_rate", actual=str(own), reference=str(other)),)


def _pair(ours: Manifest, theirs: Manifest) -> str | None:
    if ours.case is None or theirs.case is None:
        return None
    return pair_of(str(ours.case.get("dtype")), str(theirs.case.get("dtype")))


def assert_equivalent(actual: object, reference: object = None) -> Comparison:
    """Raise unless the verdict is `identical` or `equivalent`.

    Args:
        actual: A comparison, or one side of one that is still to be made.
        reference: The other side, if `actual` is not a comparison; see `truestep.compare`.

    Returns:
        The comparison, so that calls can be chained.

    Raises:
        EquivalenceError: With the failing rows, for any other verdict.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    from truestep.errors import EquivalenceError

    comparison = actual if isinstance(actual, Comparison) else compare(actual, reference)
    if not comparison.verdict.passed:
        raise EquivalenceError(comparison)
    return comparison

"""`truestep.compare`: judge two sets of tensors, whatever they come in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from truestep.case import flat_case, mapping_differences
from truestep.comparison import sources
from truestep.comparison.distance import same_bits
from truestep.comparison.latent_gate import LATENT, SIGNATURE, check_latent
from truestep.comparison.matching import build_comparison, compare_tensors
from truestep.comparison.sources import Source
from truestep.environment import Environment
from truestep.noise import pair_of
from truestep.recording.manifest import STATS, Manifest
from truestep.recording.names import address
from truestep.verdict import Comparison, Difference, Row, Side, TensorInfo, Verdict

_UNDER_TEST = ("model", "revision", "dtype")
"""Keys of a case that two recordings may differ in and still be compared: a port's own folder, and
its working precision, which has a floor of its own."""


def compare(actual: object, reference: object, *, tolerance: float | None = None) -> Comparison:
    """Judge two sides' tensors; every tensor of both is accounted for.

    Args:
        actual: A path (.safetensors, .npy, .npz, .pt), a `Recording`, a tensor or array, or a
            mapping of them.
        reference: Likewise. A recording's own measured noise floor judges; otherwise the analytic
            default for the dtypes does, and the result says so. Against a latent bundle (truestep's
            or FastVideo's) this is `check_latent`.
        tolerance: Judge rel_l2 by this limit instead.

    Returns:
        The comparison. Between recordings of different cases it is `incomparable`.

    Raises:
        FileFormatError: A file cannot be read.
        UsageError: A side is not something to compare.
    """
    ours = sources.load(actual, label="actual")
    theirs = sources.load(reference, label="reference")
    if SIGNATURE in theirs.tensors and LATENT in theirs.tensors:
        return check_latent(actual, reference, tolerance=tolerance)
    ours_manifest, theirs_manifest = ours.manifest, theirs.manifest
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
    if _moments_only(ours_manifest) or _moments_only(theirs_manifest):
        rows = _moment_rows(ours.tensors, theirs.tensors)
    else:
        rows = compare_tensors(
            ours.tensors, theirs.tensors, floor=floor, pair=pair, tolerance=tolerance
        )
    return build_comparison(
        rows,
        actual=_side(ours),
        reference=_side(theirs),
        case_id=theirs_manifest.case_id if theirs_manifest else None,
        case=theirs_manifest.case if theirs_manifest else None,
        case_differences=differences,
        environment_differences=environment,
        looked_at=(f"{len(rows)} tensors by name",),
    )


def _side(source: Source) -> Side:
    return Side(
        label=source.label,
        path=str(source.path) if source.path else None,
        environment=dict(source.manifest.environment) if source.manifest else {},
    )


def _case_differences(ours: Manifest, theirs: Manifest) -> tuple[Difference, ...]:
    if ours.case is None or theirs.case is None:
        return ()
    return mapping_differences(flat_case(ours.case), flat_case(theirs.case))


def _pair(ours: Manifest, theirs: Manifest) -> str | None:
    if ours.case is None or theirs.case is None:
        return None
    return pair_of(str(ours.case.get("dtype")), str(theirs.case.get("dtype")))


def _moments_only(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.level == "stats"


def _moment_rows(
    actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> list[Row]:
    """Rows of two recordings of which at least one holds moments only."""
    from truestep.recording.format import moments

    def all_moments(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix("stats/"): tensors[name]
            if name.startswith("stats/")
            else moments(tensors[name])
            for name in tensors
        }

    ours, theirs = all_moments(actual), all_moments(reference)
    rows = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        place = address(name)
        base = {"name": name, "stage": place.stage, "step": place.step, "branch": place.branch}
        a, r = ours.get(name), theirs.get(name)
        if a is None or r is None:
            verdict = Verdict.MISSING if a is None else Verdict.INCOMPARABLE
            rows.append(Row(**base, verdict=verdict, note="only one side has it"))
            continue
        info = TensorInfo(dtype="float64", shape=(len(STATS),))
        verdict, note = _judge_moments(a, r)
        rows.append(Row(**base, actual=info, reference=info, verdict=verdict, note=note))
    return rows


def _judge_moments(actual: torch.Tensor, reference: torch.Tensor) -> tuple[Verdict, str]:
    a = dict(zip(STATS, actual.tolist(), strict=True))
    r = dict(zip(STATS, reference.tolist(), strict=True))
    if a["nonfinite"] or r["nonfinite"]:
        return Verdict.INVALID, f"non-finite values: {a['nonfinite']:g} against {r['nonfinite']:g}"
    if not a["count"] and not r["count"]:
        return Verdict.INVALID, "empty: there is nothing to compare"
    if a["count"] != r["count"]:
        return Verdict.INCOMPARABLE, f"{a['count']:g} elements against {r['count']:g}"
    blind = "moments cannot see a permutation: record at level full"
    if same_bits(actual, reference):
        return Verdict.INCONCLUSIVE, f"the moments agree exactly; {blind}"
    scale = r["rms"] or 1.0
    worst = max(("mean", "abs_mean", "rms"), key=lambda key: abs(a[key] - r[key]))
    apart = abs(a[worst] - r[worst]) / scale
    if math.isnan(apart) or apart > 1e-2:
        return Verdict.DRIFTED, f"{worst} differs by {apart:.1e} of the rms"
    return Verdict.INCONCLUSIVE, f"{worst} differs by {apart:.1e} of the rms; {blind}"

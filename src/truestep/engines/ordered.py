"""The verdict on an engine's run: its seams in the order in which one makes the next.

Each is set against what the trusted side makes of the engine's own recorded inputs
(`expected`, `predictions`), so none inherits anything, and the first that fails is the cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from truestep.engines.absent import put_absent
from truestep.engines.between import INPUT, entering, put_between
from truestep.engines.branches import in_convention, named_by_text
from truestep.engines.conventions import AS_IT_IS, as_shape
from truestep.engines.expected import (
    FINAL,
    FRAMES,
    SIGMAS,
    TIMESTEPS,
    Seams,
    in_model_space,
    place_of,
    put_guidance,
    put_noise_and_text,
    put_schedule,
    put_updates,
)
from truestep.engines.experts import with_experts
from truestep.engines.inner import Depth, at_depth
from truestep.engines.predictions import put_decoding, put_predictions
from truestep.engines.run import Run
from truestep.engines.trusted import Trusted
from truestep.environment import Environment
from truestep.errors import UsageError
from truestep.floors import NoiseFloor
from truestep.judge.floor import Limits, pair_of
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.keys import address
from truestep.measure.distance import distance
from truestep.progress import Progress
from truestep.text import quoted
from truestep.verdict import Comparison, Row, Side, Verdict


def check_run(
    run: Run,
    model: Path,
    *,
    reference: Run | None = None,
    depth: Depth | None = "steps",
    progress: Progress | None = None,
) -> Comparison:
    """Judge an engine's run by a trusted model folder.

    Args:
        run: Of the engine; see `run_of`.
        model: Folder of diffusers with the same weights.
        reference: The trusted pipeline's run of the same case: without it schedule, noise, text and
            the scale of the guidance can be judged only as far as the folder says.
        depth: At `modules`, also name the module in which a red prediction goes wrong; None: say
            nothing of modules, as of a run on several ranks (`ranks.naming` does).
        progress: Told (what, done, total).

    Returns:
        Rows in the order of the run; the first that fails is the cause.

    Raises:
        ModelLoadError: The trusted model cannot be loaded.
        UsageError: The run has no steps.
    """
    if not run.steps and (run.final is None or reference is None):
        raise UsageError(
            "the run has no denoise steps",
            where=run.label,
            measured="only its end is known" if run.final is not None else "",
            likely="the program ended before its first step, or its denoiser is no torch module",
            hint=f"truestep show {quoted(run.label)}",
        )
    trusted, known = Trusted(model, run.dtype), reference
    found = Seams()
    run = in_model_space(found, named_by_text(run, known), trusted)
    with torch.no_grad():
        put_schedule(found, run, known, trusted)
        for name, pair in run.repeated.items():
            found.put(name, *pair)
        put_noise_and_text(found, run, known)
        put_between(found, run, known)
        conversion = put_predictions(found, run, known, trusted, progress)
        run = in_convention(run, conversion or AS_IT_IS)
        put_guidance(found, run, known)
        put_absent(found, run, known, trusted, conversion)
        put_updates(found, entering(found, run, known), known, trusted)
        put_decoding(found, run, known, trusted, progress)
    if not run.steps and known is not None:
        found.put(FINAL, run.final, known.final)
    result = _judged(found, run, known, trusted)
    with torch.no_grad():
        result, others = with_experts(result, run, found, trusted)
    if depth is None:
        return result
    opened = {name: one for name, one in found.predictions.items() if name not in others}
    return at_depth(result, run, opened, depth, known)


def _judged(found: Seams, run: Run, known: Run | None, trusted: Trusted) -> Comparison:
    working = str(trusted.dtype).removeprefix("torch.")
    floor = NoiseFloor(runs=tuple(found.floor))
    measured = Limits(floor=floor, pair=pair_of(working, working)) if found.floor else Limits()
    judged: dict[str, Row] = {}
    for predicted, limits in ((True, measured), (False, Limits())):
        names = [name for name in found.expected if _is_of_a_model(name) is predicted]
        rows = compare_tensors(
            {name: found.actual[name] for name in names},
            {name: found.expected[name] for name in names},
            limits=limits,
            describe=place_of,
        )
        judged.update({row.name: row for row in rows})
    for name, why in found.undecided.items():
        stage, step = address(name).stage, address(name).step
        fields = {"stage": stage, "step": step, "note": why}
        judged.setdefault(name, Row(name=name, verdict=Verdict.INCONCLUSIVE, **fields))
    notes = [*run.notes, *found.notes]
    notes += [f"converted: {how}" for how in found.conversions]
    notes += [f"not judged: {seam}: {why}" for seam, why in found.unjudged.items()]
    notes += _end(run, known)
    here = dict(Environment.current("cpu", attention=None))
    predictions = sum(len(step.passes) for step in run.steps)
    return build_comparison(
        _inherited(_in_order(list(judged.values()))),
        actual=Side(label=run.label, environment=dict(run.environment)),
        reference=Side(label=str(trusted.folder), environment=here),
        looked_at=(f"{len(run.steps)} steps, {predictions} predictions",),
        notes=tuple(notes),
    )


def _is_of_a_model(name: str) -> bool:
    """Whether the trusted model made it, with a floor of its own."""
    head, _, last = name.rpartition("/")
    if name == FRAMES:
        return True
    return head.startswith("step/") and last not in ("guided", "latent", INPUT)


_ORDER = ("schedule", "latent", "text", "prediction", "guidance", "update", "decoding")


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """What comes before the steps first, then step by step; within one, as it is made."""

    def place(row: Row) -> tuple[int, int, int]:
        rank = _ORDER.index(row.stage) if row.stage in _ORDER else len(_ORDER)
        if row.step is None and row.stage not in ("decoding", "update"):
            return (0, rank, 0)
        if row.step is None:
            return (2, rank, 0)
        return (1, row.step, rank)

    return sorted(rows, key=place)


def _inherited(rows: Sequence[Row]) -> list[Row]:
    """Timesteps that only follow from other sigmas are inherited from them."""
    failed = {row.name for row in rows if row.verdict in (Verdict.DRIFTED, Verdict.INVALID)}
    if SIGMAS not in failed:
        return list(rows)
    return [
        row.model_copy(update={"origin": "introduced" if row.name == SIGMAS else "inherited"})
        if row.name in failed and row.name in (SIGMAS, TIMESTEPS)
        else row
        for row in rows
    ]


def _end(run: Run, known: Run | None) -> list[str]:
    """How far the end is from the reference's: told, and never judged by itself."""
    if known is None or run.final is None or known.final is None:
        return []
    fitted, _ = as_shape(run.final, known.final)
    if fitted.shape != known.final.shape:
        sizes = f"{tuple(run.final.shape)}, {tuple(known.final.shape)}"
        return [f"the end has another size: {sizes}"]
    size = distance(fitted, known.final).rel_l2
    return [f"the end is {size:.2e} from the reference's, relative: the sum of all seams"]

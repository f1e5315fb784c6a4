"""Generate every prompt from every seed in every arm, arms interleaved, and read each clip at once.

Frames are not kept: what is kept of a clip are the numbers of every metric, and of the baseline
also those of its mutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from truestep.case import Case
from truestep.errors import FOREIGN, TruestepError, UsageError, WriteError
from truestep.experiment.arms import Arm, Run, digest, load_arm, run
from truestep.experiment.planning import arm_case
from truestep.experiment.quality import detectors
from truestep.experiment.quality.metrics import Metric, read_all
from truestep.experiment.quality.mutations import MUTATIONS, WRONG_PROMPT, Frames, other_prompts
from truestep.experiment.quality.records import Acted, Clip, QualityPlan
from truestep.experiment.quality.store import QualityStore
from truestep.experiment.records import PlannedCell
from truestep.experiment.statistics import order_of
from truestep.keys import FINALS
from truestep.runtime.acting import Counts, quantised_layers, watching
from truestep.runtime.changes import math_kernel

if TYPE_CHECKING:
    from truestep.progress import Progress
    from truestep.runtime.applying import Apply

BASELINE = ""
CONTROL = "control"
"""The baseline once more with another attention kernel: a harmless change, to tell drift from."""

CONTROLS = 8
"""Prompts that the control runs, one seed each."""


def run_quality(
    plan: QualityPlan,
    store: QualityStore,
    *,
    metrics: Sequence[Metric],
    apply: Apply | None = None,
    progress: Progress | None = None,
) -> None:
    """Generate what is not there yet; everything is in the store as soon as it is known.

    Args:
        plan: Validated; the store has it already and is locked.
        metrics: Those of the plan.
        apply: The change in the candidates.

    Raises:
        UsageError: The baseline raised, or a metric did.
        WriteError: A clip could not be written; those before it are kept.
    """
    _Quality(plan, store, tuple(metrics), apply, progress).run()


@dataclass
class _Quality:
    plan: QualityPlan
    store: QualityStore
    metrics: tuple[Metric, ...]
    apply: Apply | None
    progress: Progress | None
    arms: dict[tuple[Any, ...], Arm] = field(default_factory=dict)
    counts: dict[tuple[int, int], Counts] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        clips, _ = self.store.clips()
        self.done = {(c.cell, c.case, c.seed) for c in clips if not c.raised}
        prompts = [str(planned.content["prompt"]) for planned in self.plan.cases]
        self.prompts, self.others = prompts, other_prompts(prompts)
        self.cells = {cell.folder: cell for cell in self.plan.cells}

    def run(self) -> None:
        """Prompt by prompt of a seed, so that what is there after a stop holds most prompts."""
        places = [(c, s) for s in range(self.plan.seeds) for c in range(len(self.plan.cases))]
        for number, (case, seed) in enumerate(places):
            names = [BASELINE, *(name for name in self.cells if name not in self.failed)]
            if self.plan.frontier and seed == 0 and case < CONTROLS:
                names.append(CONTROL)
            missing = [name for name in names if (name, case, seed) not in self.done]
            if missing:
                self._group(case, seed, missing)
            if self.progress:
                self.progress("prompts x seeds", number + 1, len(places))

    def _group(self, case: int, seed: int, names: list[str]) -> None:
        """All arms of one prompt and seed, in an order drawn from the plan's seed."""
        order = order_of(names, seed=f"{self.plan.seed}/{case}/{seed}")[: len(names)]
        made: dict[str, tuple[int, Run, Counts | None]] = {}
        for place, name in enumerate(order):
            found = self._generate(name, case, seed)
            if found is not None:
                made[name] = (place, *found)
        if BASELINE in made:
            self.store.save_latent(case, seed, made[BASELINE][1].tensors[FINALS[0]])
        reference = self.store.latent(case, seed)
        for name in sorted(made):  # the baseline first: its counts are what others are set beside
            place, run_, counts = made[name]
            clip = self._read(name, (case, seed), place, run_, reference)
            if name not in (BASELINE, CONTROL):
                clip = clip.model_copy(update={"acted": self._acted(name, case, seed, counts)})
            self.store.append(clip)

    def _case(self, name: str, case: int, seed: int) -> tuple[Case, str]:
        planned = self.plan.cases[case]
        content = {**planned.content, "seed": int(planned.content.get("seed", 0)) + seed}
        own = self.plan.baseline
        if name in self.cells:
            own = {**own, **self.cells[name].candidate}
        cell = PlannedCell(name=name or "baseline", folder="as-is")
        return arm_case(planned.model_copy(update={"content": content}), cell, own)

    def _arm(self, name: str, case: Case, mode: str) -> Arm:
        """The pipeline of an arm: candidates that differ in settings alone share one."""
        changed = name in self.cells and not name.startswith("fewer-steps=")
        key = (changed, mode, case.dtype, case.settings.device, case.settings.attention_backend)
        if key not in self.arms:
            apply = self.apply if changed else None
            arm = load_arm("candidate" if changed else "baseline", case, apply=apply, compiled=mode)
            if arm.shared:
                raise UsageError(
                    "the change reaches all arms: there would be nothing to compare with",
                    measured=f"it replaced {', '.join(arm.shared[:5])}",
                    hint="change the pipeline in place and return nothing, or return a Pipeline",
                )
            self.arms[key] = arm
            run(arm, case)  # what a first run pays is nobody's time
        return self.arms[key]

    def _generate(self, name: str, case: int, seed: int) -> tuple[Run, Counts | None] | None:
        """One generation; None where a candidate raised, which is kept."""
        setup, mode = self._case(name, case, seed)
        try:
            arm = self._arm(name, setup, mode)
            if name == CONTROL:
                with math_kernel():
                    return run(arm, setup), None
            if mode != "off":  # hooks would be compiled too
                return run(arm, setup), None
            with watching(arm.pipe) as counts:
                made = run(arm, setup)
            return made, counts
        except (WriteError, UsageError):
            raise
        except FOREIGN as error:  # an arm may run the user's own code
            text = f"{type(error).__name__}: {str(error).strip()}"[:500]
            if name in (BASELINE, CONTROL):
                if isinstance(error, TruestepError):
                    raise
                raise UsageError(f"the baseline raised {text}", where=self.prompts[case]) from error
            self.failed.add(name)
            self.store.append(
                Clip(cell=name, case=case, seed=seed, seconds=0.0, latent="", raised=text)
            )
            return None

    def _read(
        self,
        name: str,
        at: tuple[int, int],
        place: int,
        made: Run,
        reference: torch.Tensor | None,
    ) -> Clip:
        """The numbers of one clip."""
        latent, video = made.tensors[FINALS[0]], made.tensors["video/frames"]
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in made.tensors.values())
        clip = Clip(
            cell=name,
            case=at[0],
            seed=at[1],
            seconds=made.seconds,
            place=place,
            frames=int(video.shape[2]),
            latent=digest(latent),
            decoded=digest(video),
            drift=None if name == BASELINE else _drift(latent, reference),
            nonfinite=bad,
        )
        if bad or name == CONTROL:
            return clip
        frames, prompt = frames_of(video), self.prompts[at[0]]
        update: dict[str, Any] = {
            "readings": read_all(self.metrics, frames, prompt),
            "broken": detectors.found_in(frames),
        }
        if name == BASELINE:
            update["mutated"] = mutated(self.metrics, frames, prompt, self.others[at[0]])
            update["planted"] = detectors.planted(frames)
        return clip.model_copy(update=update)

    def _acted(self, name: str, case: int, seed: int, counts: Counts | None) -> Acted:
        """What the candidate's mechanism did, beside what the baseline ran for the same noise."""
        setup, mode = self._case(name, case, seed)
        arm = self._arm(name, setup, mode)
        base, plain = self._case(BASELINE, case, seed)
        trusted = self._arm(BASELINE, base, plain)
        quantised = quantised_layers(arm.pipe, trusted.pipe)
        if counts is None:
            return Acted(quantised=quantised)
        before = self._baseline_counts(trusted, base, plain)
        blocks: tuple[int, ...] = ()
        if before is not None and len(before.blocks) == len(counts.blocks) and before.forwards:
            each = sum(before.blocks) / before.forwards
            gone = before.forwards - counts.forwards if counts.forwards < before.forwards else 0
            lost = [b - c for b, c in zip(before.blocks, counts.blocks, strict=True)]
            # forwards that did not run at all are counted as such, not as their blocks
            blocks = tuple(max(0, n) for n in lost) if not gone and not counts.batched else ()
            if gone and sum(lost) > round(gone * each):
                blocks = (sum(lost) - round(gone * each),)
        return Acted(
            forwards=counts.forwards,
            baseline_forwards=before.forwards if before else 0,
            blocks_skipped=blocks,
            cache_hits=tuple(counts.hits),
            batched=counts.batched,
            collapsed=counts.collapsed,
            quantised=quantised,
            fallbacks=counts.fallbacks,
        )

    def _baseline_counts(self, arm: Arm, case: Case, mode: str) -> Counts | None:
        """What the baseline runs: the same for every prompt, so it is counted once."""
        if mode != "off":
            return None
        if (0, 0) not in self.counts:
            with watching(arm.pipe) as counts:
                run(arm, case)
            self.counts[0, 0] = counts
        return self.counts[0, 0]


def frames_of(video: torch.Tensor) -> Frames:
    """Frames `f h w c` in [0, 1] of a video `b c f h w` in [-1, 1]; the first of a batch."""
    found = ((video[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0)
    array: Frames = found.contiguous().numpy()
    return array


def mutated(
    metrics: Sequence[Metric], frames: Frames, prompt: str, other: str
) -> dict[str, Mapping[str, tuple[float, ...]]]:
    """Numbers of every metric under every mutation of a clip."""
    found: dict[str, Mapping[str, tuple[float, ...]]] = {
        name: read_all(metrics, mutation.apply(frames).astype(np.float32), prompt)
        for name, mutation in MUTATIONS.items()
        if len(frames) >= mutation.needs_frames
    }
    return {**found, WRONG_PROMPT: read_all(metrics, frames, other)}


def _drift(latent: torch.Tensor, reference: torch.Tensor | None) -> float | None:
    """rel_l2; None where shapes differ."""
    if reference is None or latent.shape != reference.shape:
        return None
    size = float(reference.double().norm())
    return float((latent.double() - reference.double()).norm()) / size if size else None

"""Results as pipelines show them: a fault with its line, hostile text, a pass, a known failure."""

from __future__ import annotations

from truestep.records import (
    FrameTriple,
    KnownFailure,
    Ladder,
    Media,
    MediaEvidence,
    MediaFacts,
    MediaRun,
)
from truestep.verdict import (
    Comparison,
    Cost,
    Difference,
    Divergence,
    FloorUsed,
    Metrics,
    Results,
    Row,
    Rule,
    Side,
    Verdict,
)

RULE = Rule(name="size/1", text="by size")
HOSTILE = (
    "x|y `a` **b** @admin #12 GH-3 <img src=x onerror=alert(1)> </code></details><!-- "
    "[l](http://e.vil) "
    "www.evil.org ![p](http://e.vil/p.png)\n::error::pwned\r\n%0A::set-output name=a::b\x1b[31m"
    "\u202e $x$ :smile: ~~s~~ &#64;admin ]]> --> \ud7ff\ufffe"
)


def row(step: int, ratio: float) -> Row:
    """A prediction that is so many times over its floor."""
    metrics = Metrics(
        count=8, rel_l2=ratio * 1e-6, max_abs=1e-3, max_abs_index=(0,), cosine_distance=0.0,
        norm_ratio=1.0, gain=1.0, rms_reference=1.0,
    )  # fmt: skip
    floor = FloorUsed(
        rel_l2=1e-6, max_abs=1e-5, bound=4.0, source="measured", pair="float32/float32"
    )
    verdict = Verdict.DRIFTED if ratio > 4 else Verdict.EQUIVALENT
    return Row(
        name=f"step/{step:04d}/cond", verdict=verdict, stage="prediction", step=step, branch="cond",
        metrics=metrics, floor=floor, ratio=ratio, ratio_metric="rel_l2",
    )  # fmt: skip


def fault() -> Comparison:
    """A drift whose module and line are named, with frames to see."""
    picture = "data:image/png;base64,AAAA"
    triple = FrameTriple(index=3, actual=picture, reference=picture, difference=picture)
    return Comparison(
        tool_version="0.1.0",
        verdict=Verdict.DRIFTED,
        sentence="drifted: 2 of 4 tensors, the worst at 500 x the noise floor",
        rows=tuple(row(step, ratio) for step, ratio in enumerate((0.5, 0.8, 90.0, 500.0))),
        rule=RULE,
        first_divergence=Divergence(
            name="m", stage="module", step=2, branch="cond", fqn="blocks.1.ffn",
            kind="scaled by 1.05",
            operator="adds aten.mul.Tensor at src/change.py:6: return y * 1.05",
            file="src/change.py", line=6,
        ),
        case_id="red-three-0123",
        actual=Side(label="apply worse"),
        reference=Side(label="reference"),
        environment_differences=(Difference(key="library.torch", actual="2.14", reference="2.13"),),
        cost=Cost(forwards=6, forwards_generation=40, seconds=1.5),
        media=(Media(name="video/frames", width=8, height=8, gain=1.0, frames=(triple,)),),
        repeat="truestep check red-three --apply src/change.py:worse --depth modules",
    )  # fmt: skip


def hostile() -> Comparison:
    """A drift of which every text attacks."""
    return fault().model_copy(
        update={
            "sentence": HOSTILE,
            "case_id": HOSTILE,
            "tool_version": HOSTILE,
            "notes": (HOSTILE,),
            "repeat": HOSTILE,
            "hint": HOSTILE,
            "rows": (row(0, 9.0).model_copy(update={"name": HOSTILE, "note": HOSTILE}),),
            "first_divergence": Divergence(
                name=HOSTILE, fqn=HOSTILE, kind=HOSTILE, operator=HOSTILE, file=HOSTILE, line=1
            ),
            "media": tuple(m.model_copy(update={"name": HOSTILE}) for m in fault().media),
        }
    )


def media() -> Comparison:
    """Finished media that lie between reruns and other seeds."""
    runs = (
        MediaRun(label="again.mp4", role="same seed", distance=0.4),
        MediaRun(label="candidate.mp4", role="actual", distance=3.5),
        MediaRun(label="seed1.mp4", role="other seed", distance=31.0),
    )
    ladder = Ladder(
        place="beyond", text="farther than any rerun", needed=20, unit="levels", runs=runs
    )
    facts = MediaFacts(what="video")
    return Comparison(
        tool_version="0.1.0",
        verdict=Verdict.INCONCLUSIVE,
        sentence="inconclusive: farther than any rerun",
        rule=RULE,
        actual=Side(label="candidate.mp4"),
        reference=Side(label="reference.mp4"),
        evidence=MediaEvidence(limits="little", actual=facts, reference=facts, ladder=ladder),
        hint="save the final latents of both sides, and compare those",
        repeat="truestep compare candidate.mp4 reference.mp4",
    )


def passed() -> Comparison:
    """A check that passed."""
    return fault().model_copy(
        update={
            "verdict": Verdict.EQUIVALENT,
            "sentence": "equivalent: 4 of 4 tensors within the noise floor",
            "rows": tuple(row(step, 0.5) for step in range(4)),
            "first_divergence": None,
            "case_id": "blue-one-4567",
            "media": (),
        }
    )


def known() -> Comparison:
    """A drift that a ledger states."""
    entry = KnownFailure(
        name="a", outcome="known", text="known failure as stated", reason="issue 41",
        since="2024-10-01",
        stage="prediction", statistic="rel_l2", stated=5e-4, tolerance=0.5, measured=5e-4,
    )  # fmt: skip
    return fault().model_copy(update={"known": entry, "case_id": "green-two-89ab"})


def everything() -> Results:
    """One of each but the hostile one."""
    return Results.of([passed(), fault(), media(), known()])

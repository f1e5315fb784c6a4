"""The verdict of a cell: what fails, what differs, what is not decided, and what is missing."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import click
import jsonschema
import pytest
import torch

from truestep.case import Case
from truestep.experiment.judging import sameness
from truestep.experiment.planning import parse_matrix, pinned_cases, planned_cases
from truestep.experiment.records import (
    ARMS,
    Experiment,
    Failure,
    Plan,
    Remark,
    Repeat,
    Sameness,
    Sample,
)
from truestep.experiment.statistics import Outcome, order_of
from truestep.experiment.store import Store
from truestep.experiment.table import complete_rounds, summarise
from truestep.report.ab import cells_of, markdown, media_of, print_experiment, render
from truestep.verdict import Verdict

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
CELL = parse_matrix([])[0]
CASES = planned_cases(pinned_cases("builtin:digits", most=1))
ID = Case(**CASES[0].content).id


class Made:
    """An experiment made up in a folder."""

    def __init__(self, folder: Path, *, rounds: int = 20, **plan: object) -> None:
        values = {"until": None, "most_rounds": 100, "margin": 0.05, "expect": (), **plan}
        self.store = Store(folder)
        self.plan = Plan(
            cases=CASES,
            cells=(CELL,),
            apply="f.py:f",
            rounds=rounds,
            **values,  # type: ignore[arg-type]
        )
        self.store.begin(self.plan, resume=False)

    def time(
        self,
        rounds: int,
        *,
        candidate: float = 1.0,
        control: float = 1.0,
        noise: float = 0.01,
        forwards: int = 4,
        latents: int = 1,
    ) -> Made:
        dice = random.Random(1)
        factor = {"baseline": 1.0, "candidate": candidate, "control": control}
        for number in range(rounds):
            for place, arm in enumerate(order_of(ARMS, seed=str(number))):
                seconds = factor[arm] * math.exp(dice.gauss(0, noise))
                self.store.append(
                    CELL,
                    Sample(
                        arm=arm,  # type: ignore[arg-type]
                        case=CASES[0].name,
                        round=number,
                        session=0,
                        place=place,
                        seconds=seconds,
                        stages_s={"step": (seconds / 2, seconds / 2)},
                        memory_mib=100.0,
                        forwards=forwards if arm == "candidate" else 4,
                        latent=f"x{number % latents}" if arm == "candidate" else "x0",
                        frames="y",
                    ),
                )
        return self

    def check(self, *, off: float = 0.0, control: float = 0.0, shape: int = 4) -> Made:
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(1, 4, 3, 4, 4, generator=generator)
        frames = torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1
        tensors = {
            "baseline": {"latent/final": latent, "video/frames": frames},
            "candidate": {"latent/final": latent * (1 + off), "video/frames": frames * (1 - off)},
            "control": {"latent/final": latent * (1 + control), "video/frames": frames},
        }
        if shape != 4:
            tensors["candidate"]["latent/final"] = latent[..., :shape]
        for arm, found in tensors.items():
            self.store.save_tensors(CELL, arm, ID, found)  # type: ignore[arg-type]
        self.store.save_check(CELL, sameness(ID, tensors))
        return self

    def result(self) -> Experiment:
        return summarise(self.store)


def test_the_same_and_as_fast(tmp_path: Path) -> None:
    found = Made(tmp_path).time(20).check().result()
    cell = found.cells[0]
    assert (found.verdict, found.exit_code) == (Verdict.IDENTICAL, 0)
    assert cell.speed is not None
    assert cell.speed.outcome is Outcome.SAME
    assert cell.unchanged
    assert found.sentence.startswith("identical: apply f is as fast, ")
    assert cell.sentence.endswith("latents identical")
    assert "the switch changed nothing: same bits, forwards and speed" in markdown(found)
    with pytest.raises(TypeError, match="no truth value"):
        bool(found)


def test_faster_as_expected(tmp_path: Path) -> None:
    found = Made(tmp_path, expect=("faster",)).time(20, candidate=0.8).check().result()
    assert found.exit_code == 0
    assert "times faster" in found.sentence


def test_slower_where_faster_was_expected_is_exit_1(tmp_path: Path) -> None:
    found = Made(tmp_path, expect=("faster",)).time(20, candidate=1.1).check().result()
    assert (found.verdict, found.exit_code) == (Verdict.UNMET, 1)
    assert found.cells[0].reasons[0].startswith("expected faster, it is 1.10")


def test_a_switch_without_effect_is_inconclusive_where_one_was_expected(tmp_path: Path) -> None:
    for expect in ("faster", "different"):
        found = Made(tmp_path / expect, expect=(expect,)).time(20).check().result()
        assert (found.verdict, found.exit_code) == (Verdict.INCONCLUSIVE, 4)
        assert found.cells[0].reasons == (
            "the switch changed nothing: same bits, forwards and speed",
        )
    more = Made(tmp_path / "forwards", expect=("faster",)).time(20, forwards=2).check().result()
    assert (more.verdict, more.cells[0].unchanged) == (Verdict.UNMET, False)


def test_of_a_speed_that_is_not_decided_nobody_says_that_it_is_the_same(tmp_path: Path) -> None:
    found = Made(tmp_path, expect=("faster",)).time(20, noise=0.3).check().result()
    assert (found.verdict, found.cells[0].unchanged) == (Verdict.INCONCLUSIVE, True)
    assert found.cells[0].reasons == (
        "the switch changed nothing so far: same bits and forwards, and the speed is not decided",
    )


def test_results_that_nobody_judged_are_no_pass(tmp_path: Path) -> None:
    made = Made(tmp_path).time(20, latents=3).check()
    found = made.result()
    assert (found.verdict, found.exit_code) == (Verdict.INCONCLUSIVE, 4)
    assert not found.cells[0].unchanged
    assert found.cells[0].reasons == (
        f"{ID}: 2 more results of the candidate were not judged: give another --output to run it "
        "anew",
    )
    assert found.cells[0].looked_at_cases == 1
    row = found.cells[0].checks[0].final
    for latent in ("x1", "x2"):
        made.store.append(
            CELL,
            Repeat(
                arm="candidate", case=ID, round=1, latent=latent, frames="y", checked="x0", row=row
            ),
        )
    judged = made.result()
    assert (judged.verdict, judged.cells[0].unchanged) == (Verdict.IDENTICAL, False)


def test_drift_fails_unless_it_was_expected(tmp_path: Path) -> None:
    found = Made(tmp_path / "a").time(20).check(off=0.1).result()
    assert (found.verdict, found.exit_code) == (Verdict.DRIFTED, 1)
    assert found.cells[0].worst_final == pytest.approx(0.1, rel=1e-3)
    expected = Made(tmp_path / "b", expect=("different",)).time(20).check(off=0.1).result()
    assert expected.exit_code == 0
    same = Made(tmp_path / "c", expect=("different",)).time(20, candidate=1.2).check().result()
    assert same.verdict is Verdict.UNMET
    assert same.cells[0].reasons == ("expected different, the latents are identical",)


def test_too_much_noise_says_how_many_rounds_would_decide(tmp_path: Path) -> None:
    found = Made(tmp_path).time(20, noise=0.3).check().result()
    assert (found.verdict, found.exit_code) == (Verdict.INCONCLUSIVE, 4)
    speed = found.cells[0].speed
    assert speed is not None
    assert speed.rounds_needed is not None
    assert speed.rounds_needed > 20
    assert f"about {speed.rounds_needed} rounds would decide" in found.sentence


def test_too_few_rounds_have_no_interval(tmp_path: Path) -> None:
    found = Made(tmp_path, rounds=2).time(2).check().result()
    assert "2 rounds are too few for an interval: 4 are the least" in found.sentence
    assert json.loads(found.model_dump_json())["cells"][0]["speed"]["high"] == "inf"


def test_a_control_that_differs_spoils_the_cell(tmp_path: Path) -> None:
    found = Made(tmp_path, expect=("faster",)).time(20, candidate=0.8, control=0.9).check().result()
    assert (found.verdict, found.exit_code) == (Verdict.INCONCLUSIVE, 4)
    assert (
        found.cells[0]
        .reasons[0]
        .startswith("the A/A control shows a difference where there is none (0.90")
    )
    other = Made(tmp_path / "b").time(20).check(control=0.1).result()
    assert other.cells[0].reasons == (
        "the A/A control gives other latents than the baseline, beyond the floor",
    )


def test_expected_same(tmp_path: Path) -> None:
    near = Made(tmp_path / "a", expect=("same",)).time(40, candidate=1.02, noise=0.001).check()
    assert near.result().exit_code == 0
    far = Made(tmp_path / "b", expect=("same",)).time(40, candidate=1.2).check().result()
    assert far.cells[0].reasons[0].startswith("expected same, it is 1.20")


def test_an_interval_that_is_wider_than_asked_for(tmp_path: Path) -> None:
    found = Made(tmp_path, until=0.001).time(20, candidate=0.8).check().result()
    assert found.exit_code == 4
    assert found.cells[0].reasons[0].startswith("the interval is wider than asked for; about ")


def test_other_shapes_are_incomparable(tmp_path: Path) -> None:
    found = Made(tmp_path).time(20).check(shape=2).result()
    assert (found.verdict, found.exit_code) == (Verdict.INCOMPARABLE, 3)
    assert found.cells[0].reasons[0] == (
        "the arms give other shapes: latents [1, 4, 3, 4, 2] and [1, 4, 3, 4, 4] "
        "(candidate, baseline)"
    )


def test_what_an_arm_raised_and_what_spoils_a_run(tmp_path: Path) -> None:
    made = Made(tmp_path).time(20).check()
    made.store.append(CELL, Remark(text="the switch reaches all arms", spoils=True))
    found = made.result()
    assert (found.verdict, found.cells[0].reasons) == (
        Verdict.INCONCLUSIVE,
        ("the switch reaches all arms",),
    )
    made.store.append(CELL, Failure(arm="candidate", doing="loading", text="ValueError: no"))
    found = made.result()
    assert (found.verdict, found.exit_code) == (Verdict.INVALID, 1)
    assert found.cells[0].reasons == ("the candidate raised while loading: ValueError: no",)
    assert found.cells[0].speed is not None


def test_a_machine_without_a_compiler_is_no_fault_of_the_arm(tmp_path: Path) -> None:
    made = Made(tmp_path)
    text = "InductorError: InvalidCxxCompiler: No working C++ compiler found\nmore"
    made.store.append(CELL, Failure(arm="candidate", doing="generating", text=text, machine=True))
    found = made.result()
    assert (found.verdict, found.exit_code) == (Verdict.MISSING, 3)
    assert found.cells[0].reasons == (
        "torch.compile does not work on this machine: InductorError: InvalidCxxCompiler: "
        "No working C++ compiler found",
    )


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    empty = Made(tmp_path / "a").result()
    assert empty.exit_code == 4
    assert empty.cells[0].missing == (
        f"{ID}: latents and frames of baseline, candidate, control",
        "20 of 20 rounds",
    )
    made = Made(tmp_path / "b").time(5).check()
    made.store.media(CELL, "control", ID).unlink()
    found = made.result()
    assert found.cells[0].missing == (f"{ID}: frames of control", "15 of 20 rounds")
    (tmp_path / "b" / CELL.folder / "candidate" / f"{ID}.check.json").unlink()
    rebuilt = made.result().cells[0]
    assert rebuilt.ssim_worst == 1.0
    assert f"{ID}: the stages were not checked, the final latent was" in rebuilt.notes


def test_a_round_that_was_cut_short_counts_once_it_is_whole() -> None:
    def runs(session: int, count: int) -> list[Sample]:
        return [
            Sample(
                arm="baseline",
                case="c",
                round=0,
                session=session,
                place=place,
                seconds=1.0 + session,
                stages_s={},
                forwards=1,
                latent="",
                frames="",
            )
            for place in range(count)
        ]

    assert complete_rounds(runs(0, 5)) == []
    assert complete_rounds([*runs(0, 5), *runs(1, 6)]) == [runs(1, 6)]


def test_the_table_as_text_markdown_and_html(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made(tmp_path).time(20, candidate=0.8).check(off=0.01)
    found = made.result()
    row = cells_of(found.cells[0])
    assert row[0] == "as it is"
    assert row[-1] == "4"
    print_experiment(found, folder="DIR", report=None)
    text = click.unstyle(capsys.readouterr().out)
    assert text.startswith("FAILED drifted: apply f is ")
    assert len(text.splitlines()) <= 12
    print_experiment(found, folder="DIR", report=None, verbose=True)
    text = click.unstyle(capsys.readouterr().out)
    assert "FAILED drifted as it is [apply f]" in text
    assert "A/A (99 %)" in text
    table = markdown(found)
    assert table.count("\n| as it is | drifted | ") == 1
    page = render(
        Experiment.model_validate_json(found.model_dump_json()), media_of(made.store, found)
    )
    assert page == render(found, media_of(made.store, found))
    assert page.count("data:image/png;base64,") == 15
    assert page.count('<div class="triple small" data-index="') == 5  # all to be seen without JS
    assert "script-src 'sha256-" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "a red three moving left" in page


def test_a_prompt_cannot_attack_the_page(tmp_path: Path) -> None:
    prompt = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    case = Case(model="builtin:digits", prompt=prompt)
    store = Store(tmp_path)
    plan = Plan(
        cases=planned_cases({prompt: case}), cells=(CELL,), rounds=1, most_rounds=1, margin=0.05
    )
    store.begin(plan, resume=False)
    frames = torch.zeros(1, 3, 2, 16, 16)
    for arm in ARMS:
        store.save_tensors(CELL, arm, case.id, {"latent/final": frames, "video/frames": frames})
    found = summarise(store)
    page = render(found, media_of(store, found))
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert page.count("</script>") == 2


def test_an_experiment_fits_the_published_schema(tmp_path: Path) -> None:
    schema = json.loads((SCHEMAS / "experiment-1.json").read_text("utf-8"))
    drifted = Made(tmp_path / "a", until=0.01, expect=("faster",)).time(20).check(off=0.1).result()
    empty = Made(tmp_path / "b").time(2).result()  # no interval: infinity is a string
    for found in (drifted, empty):
        plain = json.loads(found.model_dump_json())
        jsonschema.validate(plain, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**plain, "verdict": "fine"}, schema)


def test_a_check_survives_json() -> None:
    check = Sameness(case="c", psnr_db=math.inf, ssim_worst=math.nan)
    again = Sameness.model_validate_json(check.model_dump_json())
    assert again.psnr_db == math.inf
    assert again.ssim_worst is not None
    assert math.isnan(again.ssim_worst)

"""Experiments on a tiny model: three arms of their own, resumed, broken, switched globally."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from truestep.case import Case
from truestep.experiment import running
from truestep.experiment.arms import Arm, Run, choose, load_arm, run
from truestep.experiment.planning import parse_matrix, planned_cases
from truestep.experiment.records import ARMS, Plan, Sample
from truestep.experiment.running import run_experiment
from truestep.experiment.store import Store
from truestep.experiment.table import summarise
from truestep.report.ab import markdown
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict

Change = Callable[[Pipeline], None]


@pytest.fixture
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, object]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "steps": 2})


def planned(case: Case, *, matrix: tuple[str, ...] = (), **values: object) -> Plan:
    options = {"apply": "f.py:f", "rounds": 1, "most_rounds": 1, "margin": 0.05, **values}
    cells = tuple(parse_matrix(matrix))
    return Plan(cases=planned_cases({"three": case}), cells=cells, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings with floors that several tests may begin with."""
    return tmp_path_factory.mktemp("kept")


def begun(
    folder: Path, plan: Plan, change: Change | None = None, *, kept: Path | None = None
) -> Store:
    """Run a plan. With `kept`, each baseline is recorded once for all tests that give it: a resumed
    experiment takes the recording that is there."""
    store = Store(folder)
    store.begin(plan, resume=(folder / "plan.json").exists())
    if kept is not None:
        shutil.copytree(kept, folder / "recordings", dirs_exist_ok=True)
    threads = torch.get_num_threads()
    run_experiment(plan, store, apply=change)
    if kept is not None and torch.get_num_threads() == threads:  # the change is the candidate's
        shutil.copytree(folder / "recordings", kept, dirs_exist_ok=True)
    return store


def fused(pipe: Pipeline) -> None:
    pipe.transformer.fuse_qkv_projections()


def biased(pipe: Pipeline) -> None:
    pipe.transformer.proj_out.bias.data += 0.05


def test_a_harmless_change_is_the_same_and_a_planted_bias_is_found(
    case: Case, tmp_path: Path, kept: Path
) -> None:
    same = summarise(begun(tmp_path / "same", planned(case), fused, kept=kept)).cells[0]
    assert same.sameness is not None
    assert same.sameness.passed
    assert same.checks[0].steps is not None
    assert [s.arm for s in same.samples][:3] == [s.arm for s in same.samples][:2:-1]
    assert {s.arm for s in same.samples} == set(ARMS)
    assert {s.forwards for s in same.samples} == {4}
    assert len(same.samples[0].stages_s["step"]) == 2
    assert set(same.samples[0].stages_s) == {"text", "schedule", "latent", "step", "decode"}

    other = summarise(begun(tmp_path / "other", planned(case), biased, kept=kept)).cells[0]
    assert other.verdict is Verdict.DRIFTED
    assert other.first_divergence == "`step/0000/cond`, step 0, cond"
    assert other.control_ssim_worst == 1.0


def test_a_resumed_experiment_keeps_what_it_has_and_adds_the_rest(
    case: Case, tmp_path: Path
) -> None:
    store = begun(tmp_path, planned(case), fused)
    path = tmp_path / "eager" / "as-is" / "samples.jsonl"
    cut = path.read_bytes().splitlines(keepends=True)[:4]
    path.write_bytes(b"".join(cut) + b'{"kind":"sam')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    begun(tmp_path, planned(case, rounds=2, most_rounds=2), fused)
    assert path.read_bytes().startswith(b"".join(cut))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    cell = summarise(store).cells[0]
    assert cell.speed is not None
    assert (cell.speed.rounds, cell.speed.pairs) == (2, 4)
    assert {s.session for s in cell.samples} == {0, 1}
    assert cell.notes == ("1 damaged line left out: eager/as-is/samples.jsonl, line 5",)


def test_an_arm_that_raises_ends_its_cell_only(case: Case, tmp_path: Path, kept: Path) -> None:
    def picky(pipe: Pipeline) -> None:
        old = pipe.decode

        def decode(inner: Pipeline, latent: torch.Tensor) -> torch.Tensor:
            if inner.settings.guidance_scale == 4.0:
                raise RuntimeError("no kernel for this scale")
            return old(inner, latent)

        pipe.decode = decode

    plan = planned(case, matrix=("guidance_scale=4.0,3.0",))
    first, second = summarise(begun(tmp_path, plan, picky, kept=kept)).cells
    assert first.verdict is Verdict.INVALID
    assert first.reasons == (
        "the candidate raised while generating three: RuntimeError: no kernel for this scale",
    )
    assert second.speed is not None
    assert second.sameness is not None
    assert second.sameness.passed
    assert first.missing == (
        "three: latents and frames of baseline, candidate, control",
        "1 of 1 rounds",
    )


def test_arms_of_other_shapes_are_timed_and_incomparable(
    case: Case, tmp_path: Path, kept: Path
) -> None:
    plan = planned(case, apply="", candidate={"num_frames": "9"})
    cell = summarise(begun(tmp_path, plan, kept=kept)).cells[0]
    assert cell.verdict is Verdict.INCOMPARABLE
    assert "the arms give other shapes: latents " in cell.sentence
    assert cell.speed is not None


def test_a_switch_that_reaches_all_arms_spoils_the_cell(
    case: Case, tmp_path: Path, kept: Path
) -> None:
    now = torch.get_num_threads()

    def everywhere(pipe: Pipeline) -> None:
        torch.set_num_threads(now + 1)

    cell = summarise(begun(tmp_path, planned(case), everywhere, kept=kept)).cells[0]
    assert cell.verdict is Verdict.INCONCLUSIVE
    assert cell.reasons[0] == (
        f"the switch reaches all arms: loading candidate changed torch.threads {now} -> {now + 1}"
    )


def test_a_change_of_settings_goes_over_every_case(case: Case) -> None:
    def scale(pipe: Pipeline) -> None:
        pipe.settings.guidance_scale = 2.0

    arm = load_arm("candidate", case, apply=scale, compiled="off")
    choose(arm, case.replace(prompt="a green seven moving up", seed=3))
    settings = arm.pipe.settings
    assert (settings.guidance_scale, settings.seed) == (2.0, 3)
    assert settings.prompt == "a green seven moving up"
    made = run(arm, case)
    assert made.tensors["latent/final"].shape == (1, 8, 3, 8, 8)
    assert made.tensors["video/frames"].shape == (1, 3, 5, 16, 16)
    assert made.seconds >= sum(made.stages_s["step"])


def test_samples_are_strict_json(case: Case, tmp_path: Path, kept: Path) -> None:
    store = begun(tmp_path, planned(case, apply="", expect=("same",)), kept=kept)
    lines, damaged = store.lines(parse_matrix([])[0])
    assert damaged == []
    assert all(isinstance(line, Sample) for line in lines)
    assert len({line.latent for line in lines if isinstance(line, Sample)}) == 1


def test_one_arms_attention_backend_does_not_reach_the_others(case: Case, tmp_path: Path) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    plain = load_arm("baseline", case, compiled="off")
    before, expected = Registry._active_backend, run(plain, case).tensors["latent/final"]
    math = case.replace(attention_backend="_native_math")
    other = load_arm("candidate", math, compiled="off")
    changed = run(other, math).tensors["latent/final"]
    assert not torch.equal(changed, expected)
    assert Registry._active_backend is before
    assert torch.equal(run(plain, case).tensors["latent/final"], expected)
    assert torch.equal(run(other, math).tensors["latent/final"], changed)


def test_a_change_of_shared_code_spoils_the_cell(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(pipe: Pipeline) -> None:
        owner = type(pipe.transformer.blocks[0])
        old = owner.forward
        monkeypatch.setattr(owner, "forward", lambda *a, **k: old(*a, **k) * 1.01)

    cell = summarise(begun(tmp_path, planned(case), everywhere)).cells[0]
    assert cell.verdict is Verdict.INCONCLUSIVE
    assert cell.reasons[:2] == (
        "the switch reaches all arms: it replaced WanTransformerBlock.forward",
        "the switch reaches all arms: the baseline gives other latents once the candidate is "
        "loaded",
    )


def generations_changed(
    monkeypatch: pytest.MonkeyPatch, of: str, change: Callable[[int, dict[str, torch.Tensor]], None]
) -> None:
    """Change what an arm's generations leave behind; the first is number 1."""
    numbers = itertools.count(1)

    def changed(arm: Arm, case: Case) -> Run:
        made = run(arm, case)
        if arm.name == of:
            change(next(numbers), made.tensors)
        return made

    monkeypatch.setattr(running, "run", changed)


def scaled(name: str, by: float, *, first: int) -> Callable[[int, dict[str, torch.Tensor]], None]:
    """One tensor from one generation on."""

    def change(number: int, tensors: dict[str, torch.Tensor]) -> None:
        if number >= first:
            tensors[name] = tensors[name] * by

    return change


CHECKED = 2  # the candidate's generations up to the one that is checked


def alike(case: Case, **values: object) -> Plan:
    return planned(case, apply="", expect=("same",), **values)


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_candidate_that_drifts_after_its_check_is_found(
    case: Case, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, warmup: int
) -> None:
    generations_changed(monkeypatch, "candidate", scaled("latent/final", 1.1, first=CHECKED + 2))
    found = summarise(begun(tmp_path, alike(case, warmup=warmup), kept=kept))
    cell = found.cells[0]
    assert (found.verdict, found.exit_code) == (Verdict.DRIFTED, 1)
    assert not cell.unchanged
    place = "warming up" if warmup else "round 0"
    assert cell.first_divergence == f"`latent/final`, {place}"
    assert cell.worst_final == pytest.approx(0.1, rel=1e-3)
    assert "candidate: repeats of one case gave 2 different latents; the furthest is drifted " in (
        markdown(found)
    )
    assert "changed nothing" not in markdown(found)


def test_a_drift_before_the_check_or_in_every_round_is_found(
    case: Case, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(number: int, tensors: dict[str, torch.Tensor]) -> None:
        if number == 1:
            tensors["latent/final"] = tensors["latent/final"] * 1.1

    generations_changed(monkeypatch, "candidate", first)
    store = begun(tmp_path / "first", alike(case), kept=kept)
    assert summarise(store).verdict is Verdict.DRIFTED
    generations_changed(monkeypatch, "candidate", scaled("latent/final", 1.1, first=CHECKED + 1))
    found = summarise(begun(tmp_path / "all", alike(case, warmup=0), kept=kept))
    assert found.verdict is Verdict.DRIFTED
    assert found.cells[0].arms["candidate"].results == 1
    assert "candidate: repeats of one case gave 2 different latents; " in markdown(found)


def test_a_decoder_that_drifts_after_its_check_is_found(
    case: Case, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations_changed(monkeypatch, "candidate", scaled("video/frames", 1.1, first=CHECKED + 1))
    found = summarise(begun(tmp_path, alike(case), kept=kept))
    assert found.verdict is Verdict.DRIFTED
    assert found.cells[0].worst_final == 0.0
    assert (
        "candidate: repeats of one case gave one latent decoded to other frames; the furthest "
        in (markdown(found))
    )


def test_a_candidate_that_varies_within_the_floor_is_equivalent_and_said_to_vary(
    case: Case, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounding(number: int, tensors: dict[str, torch.Tensor]) -> None:
        tensors["latent/final"] = tensors["latent/final"] * (1 + 2**-23 * (number % 3))

    generations_changed(monkeypatch, "candidate", rounding)
    found = summarise(begun(tmp_path, alike(case), kept=kept))
    cell = found.cells[0]
    assert cell.sameness is Verdict.EQUIVALENT
    assert not cell.unchanged
    assert not any("latents" in reason for reason in cell.reasons)
    assert "different latents; the furthest is equivalent (rel_l2 " in markdown(found)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("baseline", "the baseline gives other latents from one run to the next, beyond the floor"),
        (
            "control",
            "the A/A control gives other latents from one run to the next, beyond the floor",
        ),
    ],
)
def test_a_trusted_arm_that_does_not_stay_the_same_decides_nothing(
    case: Case, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, arm: str, said: str
) -> None:
    generations_changed(monkeypatch, arm, scaled("latent/final", 1.1, first=6))
    found = summarise(begun(tmp_path, alike(case, rounds=3, most_rounds=3), kept=kept))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert any(reason.startswith(said) for reason in found.cells[0].reasons)


def test_a_resumed_experiment_judges_what_its_new_rounds_give(
    case: Case, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = alike(case)
    assert summarise(begun(tmp_path, plan, kept=kept)).cells[0].sameness is Verdict.IDENTICAL
    generations_changed(monkeypatch, "candidate", scaled("latent/final", 1.1, first=1))
    more = plan.model_copy(update={"rounds": 2, "most_rounds": 2})
    found = summarise(begun(tmp_path, more, kept=kept)).cells[0]
    assert found.verdict is Verdict.DRIFTED
    assert len(found.repeats) == 1

"""The module in which an engine's red prediction goes wrong, from a recording of its modules."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import Captured, runner
from truestep.calls.recording import read
from truestep.engines.inner import paired, skeleton
from truestep.engines.inside import INSIDE
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.run import Run
from truestep.engines.running import Ran, run_engine
from truestep.engines.trusted import Trusted
from truestep.engines.watch.inside import Inside
from truestep.engines.watch.request import Looked
from truestep.engines.watch.spool import CallSpool
from truestep.errors import FileFormatError
from truestep.recording.format import Recording
from truestep.replay.statements import Operator, differing_in_step, maker
from truestep.verdict import Comparison, Verdict

PORT = Path(__file__).parent.parent / "examples" / "module_port.py"
OTHER = Path(__file__).parent.parent / "examples" / "engine_port.py"
MODULES = {
    "bias": ("blocks.1.attn2.to_out.0", "a bias"),
    "gelu": ("blocks.0.ffn", "before blocks.0.ffn.net.2"),
    "modulation": ("blocks.1", "before blocks.1.ffn"),
    "eps": ("blocks.0.attn1.norm_q", ""),
    "residual": ("blocks.1", "before blocks.1.ffn"),
    "rope": ("blocks.0.attn1", "before blocks.0.attn1.to_out.0"),
    "weight": ("blocks.0.attn1.to_k", ""),
    "head": ("(root)", "before proj_out"),
    "text": ("condition_embedder.text_embedder.act_1", ""),
}
OF_THE_ENGINE = {
    "bias": "`layers.1.cross.out`, WithoutBias at module_port.py:",
    "gelu": "self.down(self.act(self.up(x))) (default for approximate = 'tanh'); the engine's `lay",
    "modulation": "`layers.1`, Exchanged at module_port.py:",
    "residual": "made = self.mlp(self.norm_mlp(x) * (1 + mlp_scale) + mlp_shift); the engine's `l",
    "head": "self.proj((self.norm(x) * (1 + scale) + shift).to(x.dtype)); the engine's `(root)`",
    "rope": "`layers.0.self_attn`, SelfAttention at model.py:",
    "weight": "weight differs by 0.02; the engine's `layers.0.self_attn.qkv`",
}
"""What is said of the engine's own code and weights: the operator, or what made a wrong tensor."""


def ran(
    model: Path, folder: Path, style: str, *faults: str, inside: Looked | None, port: Path = PORT
) -> Ran:
    """Generations of a port, one a fault, recorded into a folder."""
    folder.mkdir(exist_ok=True)
    inputs = folder / "inputs.safetensors"
    inputs.write_bytes((model.parent / "inputs.safetensors").read_bytes())
    command = [sys.executable, str(port), str(model), str(inputs), style, *faults]
    return run_engine(command, folder / "run.safetensors", inside=inside)


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The right generation, then one a fault, with the modules of the first two calls."""
    folder = tmp_path_factory.mktemp("modules")
    inside = Looked(operators=True)
    made = ran(model, folder / "call", "call", "none", *MODULES, inside=inside)
    assert (made.code, made.failures) == (0, [])
    found = [run_of(path) for path, _ in made.recordings]
    return dict(zip(("none", *MODULES), found, strict=True))


@pytest.fixture(scope="module")
def verdicts(model: Path, reference: Path, runs: dict[str, Run]) -> dict[str, Comparison]:
    known = run_of(reference)
    return {
        fault: check_run(run, model, reference=known, depth="modules")
        for fault, run in runs.items()
    }


@pytest.mark.parametrize("fault", MODULES)
def test_the_module_of_a_fault_is_named(verdicts: dict[str, Comparison], fault: str) -> None:
    result = verdicts[fault]
    assert result.verdict is Verdict.DRIFTED
    place = result.first_divergence
    assert place is not None
    fqn, kind = MODULES[fault]
    assert (place.fqn, place.step, place.branch) == (fqn, 0, "cond"), result.sentence
    assert (place.kind or "").startswith(kind)
    assert OF_THE_ENGINE.get(fault, "the engine's `") in (place.operator or "")
    failed = [r for r in result.rows if r.stage == "prediction module" and not r.verdict.passed]
    assert failed
    assert not result.hint


def test_a_right_port_is_opened_by_nobody(verdicts: dict[str, Comparison]) -> None:
    result = verdicts["none"]
    assert result.verdict is Verdict.EQUIVALENT, result.sentence
    assert not [row for row in result.rows if row.stage == "prediction module"]


def test_every_module_of_a_right_port_agrees(
    model: Path, reference: Path, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drill itself, where it is opened without need, names nothing."""
    from truestep.engines import inner

    monkeypatch.setattr(inner, "FAILED", (Verdict.EQUIVALENT, Verdict.IDENTICAL))
    result = check_run(runs["none"], model, reference=run_of(reference), depth="modules")
    assert result.verdict is Verdict.EQUIVALENT
    agree = "no module named: on the same inputs every module of the trusted WanTransformer3DModel"
    assert [note for note in result.notes if note.startswith(agree)]


def test_branches_of_one_call_are_told_apart(model: Path, reference: Path, tmp_path: Path) -> None:
    made = ran(model, tmp_path / "batch", "batch", "none", "eps", inside=Looked((0,)))
    known = run_of(reference)
    right, wrong = (
        check_run(run_of(path), model, reference=known, depth="modules")
        for path, _ in made.recordings
    )
    assert right.verdict is Verdict.EQUIVALENT, right.sentence
    assert wrong.first_divergence is not None
    assert wrong.first_divergence.fqn == "blocks.0.attn1.norm_q"


def test_a_function_that_goes_through_the_parts_is_looked_into(
    model: Path, reference: Path, tmp_path: Path
) -> None:
    inside = Looked((1,), operators=True)
    made = ran(model, tmp_path / "f", "function", "none", "bias", inside=inside, port=OTHER)
    known = run_of(reference)
    right, wrong = (run_of(path) for path, _ in made.recordings)
    assert {*right.insides} == {("WanTransformer3DModel.predict", 1)}
    result = check_run(right, model, reference=known, depth="modules")
    assert result.verdict is Verdict.EQUIVALENT, result.sentence
    result = check_run(wrong, model, reference=known, depth="modules")
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "(root)"  # it is added behind all modules
    assert (result.first_divergence.kind or "").startswith("constant offset 0.01")
    assert ".flatten(2, 3) + added" in (result.first_divergence.operator or "")
    assert result.first_divergence.branch == "uncond"


def test_what_was_not_recorded_is_recorded_by_the_command_of_the_hint(
    model: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    made = ran(model, tmp_path / "plain", "call", "bias", inside=None)
    path = made.recordings[0][0]
    result = check_run(run_of(path), model, reference=run_of(reference), depth="modules")
    assert result.first_divergence is not None
    assert result.first_divergence.fqn is None
    assert "no module named: those of `step/0000/cond` were not recorded" in result.notes
    words = shlex.split(result.hint)
    assert words[:5] == ["truestep", "engine", "run", "--depth", "modules"]
    truestep = runner(monkeypatch, capsys, "engine")
    code, out, _ = truestep(*words[2:])
    assert code == 0
    again = shlex.split(next(line for line in out.splitlines() if line.startswith("check: "))[7:])
    assert again[-2:] == ["--depth", "modules"]
    again[again.index("MODEL_FOLDER")] = str(model)
    code, out, _ = truestep(*again[2:-2])  # at depth steps, the hint says how to go on
    assert code == 1
    deeper = shlex.split(next(line for line in out.splitlines() if "--depth modules" in line))
    code, out, _ = truestep(*deeper[3:])
    assert code == 1
    assert "`blocks.1.attn2.to_out.0`, step 0, cond: a bias" in " ".join(out.split())


def test_calls_and_modules_are_chosen(model: Path, reference: Path, tmp_path: Path) -> None:
    inside = Looked((4,), "layers.1*")
    made = ran(model, tmp_path / "chosen", "call", "bias", "eps", inside=inside)
    late, other = (run_of(path) for path, _ in made.recordings)
    known = run_of(reference)
    ((name, number),) = late.insides
    assert (name, number) == ("Model.forward", 4)
    assert {event.fqn.split(".")[1] for event in late.insides[name, number].events} == {"1"}
    place = check_run(late, model, reference=known, depth="modules").first_divergence
    assert place is not None
    assert (place.fqn, place.step, place.branch) == ("blocks.1.attn2.to_out.0", 2, "cond")
    place = check_run(other, model, reference=known, depth="modules").first_divergence
    assert place is not None  # its module was not chosen: nothing of what was is wrong
    assert place.fqn is None or not place.fqn.startswith("blocks.1.")


def test_what_is_kept_has_a_bound_and_layers_answer_as_others_do(
    model: Path, reference: Path, tmp_path: Path
) -> None:
    most = 300_000
    made = ran(model, tmp_path / "most", "call", "none", "bias", inside=Looked(largest=most))
    right, wrong = (run_of(path) for path, _ in made.recordings)
    for path, recording in made.recordings:
        inner = [e for e in recording.recording.manifest.tensors if e.kind in ("module", "weight")]
        names = {entry.name for entry in inner}
        size = sum(
            recording.recording[n].numel() * recording.recording[n].element_size() for n in names
        )
        assert 0 < size <= most, path
    (first, *_) = right.insides.values()
    assert first.left
    assert not [name for name in first.weights if name.startswith("layers.1.mlp")]
    denoiser = Trusted(model, torch.float32).denoiser(None)
    partners = paired(skeleton(first), denoiser)
    assert partners is not None
    assert [part.fqn for part in partners.candidate("layers.1.cross.q")] == ["blocks.1.attn2.to_q"]
    assert len(partners.candidate("layers.1.self_attn.qkv")) == 3
    known = run_of(reference)
    assert check_run(right, model, reference=known, depth="modules").verdict.passed
    result = check_run(wrong, model, reference=known, depth="modules")
    assert result.first_divergence is not None
    assert (result.first_divergence.fqn or "").startswith("blocks.1")
    assert [note for note in result.notes if "for which there was no room" in note]


def test_modules_are_recorded_without_a_change_of_what_is_made(
    model: Path, runs: dict[str, Run], tmp_path: Path
) -> None:
    made = ran(model, tmp_path / "alone", "call", "none", inside=None)
    alone, watched = run_of(made.recordings[0][0]).final, runs["none"].final
    assert alone is not None
    assert watched is not None
    assert torch.equal(alone, watched)


def test_modules_of_a_process_alone_are_kept_once(runs: dict[str, Run]) -> None:
    recording = read(Path(runs["none"].label))
    assert INSIDE in recording.recording.manifest.settings
    assert not {"part", "collective"} & {call.kind for call in recording.calls}


def test_hooks_are_gone_behind_a_call_and_what_fails_in_them_ends_the_look_alone(
    tmp_path: Path,
) -> None:
    import threading

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    failures: list[Exception] = []
    inside = Inside(Looked((0,)), threading.RLock(), failures.append)
    spool = CallSpool(tmp_path / "x.safetensors", 1, {}, largest=1 << 20)
    table = inside.open(model, spool)
    assert table is not None
    with torch.no_grad():
        model(torch.ones(1, 4))
    assert [event[:3] for event in table["modules"]] == [
        ["0", 0, "in"], ["0", 0, "out"], ["1", 0, "in"], ["1", 0, "out"]
    ]  # fmt: skip
    inside.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    inside.begin()
    assert inside.open(model, spool) is not None
    spool.keep_within = None  # type: ignore[method-assign, assignment]
    expected = model[1](
        torch.nn.functional.linear(torch.ones(1, 4), model[0].weight, model[0].bias)
    )
    assert torch.equal(model(torch.ones(1, 4)), expected)
    assert len(failures) == 1
    inside.close()


def test_an_operator_is_named_only_while_both_sides_do_the_same() -> None:
    def op(name: str, value: float, *arguments: str) -> Operator:
        return Operator(name, arguments, (torch.full((2, 2), value),), "a.py:1", f"{name}()")

    right = [op("mul", 1.0), op("add", 2.0), op("exp", 3.0)]
    assert differing_in_step(right, right, right) is None
    wrong = [op("mul", 1.0), op("add", 2.5), op("exp", 3.0)]
    assert (differing_in_step(wrong, right, right) or "").startswith("add at a.py:1")
    told = differing_in_step([op("mul", 1.0, "dim = 1")], [op("mul", 1.0, "dim = 2")])
    assert "dim = 1 for dim = 2" in (told or "")
    other = [op("sub", 1.0), *wrong]  # other code: nothing behind it says anything
    assert differing_in_step(other, right, right) is None
    assert (maker(torch.full((4,), 2.5), wrong) or "").startswith("made by add")
    assert maker(torch.full((4,), 9.0), wrong) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told.update(calls=[]),
        lambda told: told["calls"]["0"].update(modules=[["a"]]),
        lambda told: told["calls"].update(x={"modules": [], "left": 0}),
        lambda told: told.pop("classes"),
        lambda told: told["calls"]["0"].update(left="many"),
        lambda told: told["calls"]["0"].update(operators=[["a", "b"]]),
    ],
)
def test_a_damaged_table_of_modules_is_refused(
    model: Path, tmp_path: Path, runs: dict[str, Run], damage: object
) -> None:
    recording = Recording.open(Path(runs["none"].label))
    settings = json.loads(json.dumps(recording.manifest.settings))
    damage(settings[INSIDE]["Model.forward"])  # type: ignore[operator]
    manifest = recording.manifest.model_copy(update={"settings": settings})
    path = tmp_path / "damaged.safetensors"
    read(runs["none"].label).with_manifest(manifest).write(path)
    with pytest.raises(FileFormatError, match="an engine's modules cannot be read"):
        run_of(path)

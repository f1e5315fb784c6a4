"""`truestep trace record`, `run` and `recover`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Run, runner
from tests.replay.models import given, model
from truestep.case import Case
from truestep.recording.format import Recording
from truestep.replay.trace import record_trace, verify
from truestep.verdict import Verdict


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd)


@pytest.fixture
def project(run: Run, tmp_path: Path, tiny_wan: dict[str, Path]) -> Run:
    """The same, with a case file."""
    (tmp_path / "truestep.toml").write_text(
        f'[case.three]\nmodel = "{tiny_wan["wan21"]}"\nprompt = "a red three moving left"\n'
        "steps = 4\nguidance_scale = 4.0\nheight = 16\nwidth = 16\nnum_frames = 5\n"
        'max_sequence_length = 8\nsettings = { device = "cpu" }\n'
    )
    return run


def test_record(project: Run, tmp_path: Path) -> None:
    code, out, _ = project(
        "trace", "record", "three", "--select", "blocks.?", "--steps", "0,2",
        "--output", "t.safetensors",
    )  # fmt: skip
    assert code == 0
    assert "untraced     identical, 1 output tensors, bit for bit" in out
    assert "in 2 steps, level stats" in out
    assert out.endswith("trace: t.safetensors\n")
    manifest = Recording.open(tmp_path / "t.safetensors").manifest
    assert {entry.step for entry in manifest.tensors} == {0, 2}
    assert manifest.forwards == 6  # it ended after the last step asked for
    assert manifest.case is not None


def test_record_refuses(project: Run, tmp_path: Path) -> None:
    for arguments, message in (
        (("--select", "blcks.0"), "no module matches 'blcks.0'"),
        (("--steps", "0,9"), "no step 9 in the case"),
        (("--steps", "first"), "steps are numbers by commas"),
    ):
        code, _, err = project("trace", "record", "three", *arguments)
        assert code == 2
        assert message in err
    assert not (tmp_path / "trace.safetensors").exists()


def test_run_and_recover(run: Run, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    (tmp_path / "run.py").write_text(
        f"import sys, os, signal\nsys.path.insert(0, {root!r})\n"
        "from tests.replay.models import model, given\nmodel()(given())\n"
        "if '--kill' in sys.argv:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(len(sys.argv) - 1)\n"
    )
    code, out, err = run(
        "trace", "run", "--select", "blocks.*", "--class", "Model", "--", sys.executable, "run.py",
        "--select", "x",
    )  # fmt: skip
    assert code == 2  # the program's own
    assert "tracing Model" in err
    assert "TRACED: 9 tensors of 6 modules in 1 steps, level stats" in out
    code, out, _ = run(
        "trace", "run", "--output", "k.safetensors", "--", sys.executable, "run.py", "--kill"
    )
    assert code == 137
    assert "partial: the program was killed. truestep trace recover" in out
    code, out, _ = run("trace", "recover", "k.safetensors")
    assert code == 0
    assert "note         partial: the process ended before the trace was closed" in out
    code, _, err = run("trace", "recover", "k.safetensors")
    assert code == 2
    assert "there is no spool to recover" in err


def test_run_that_traces_nothing_says_so(run: Run) -> None:
    code, out, _ = run("trace", "run", "--", sys.executable, "-c", "print('hello')")
    assert code == 4
    assert "hello" in out
    assert "NOT TRACED" in out
    code, _, err = run("trace", "run", "--", "no-such-program")
    assert code == 2
    assert "the program cannot be started" in err


def test_verify() -> None:
    net = model()
    with torch.no_grad():
        assert verify(net, lambda: net(given()), level="full", ops="*").verdict is Verdict.IDENTICAL
        assert verify(net, lambda: torch.rand(3)).verdict is Verdict.IDENTICAL  # same random state
        assert verify(net, lambda: None).verdict is Verdict.INCONCLUSIVE
        calls = iter(range(9))
        unstable = verify(net, lambda: torch.tensor(next(calls)))
        assert unstable.verdict is Verdict.INCONCLUSIVE
        disturbed = verify(net, lambda: torch.tensor(len(net.out._forward_hooks)))
        assert disturbed.verdict is Verdict.DRIFTED


def test_a_model_that_tracing_disturbs_is_refused(
    tiny_wan: dict[str, Path], tiny_case: dict[str, object], tmp_path: Path
) -> None:
    from truestep.errors import TruestepError

    case = Case(model=str(tiny_wan["wan21"]), **tiny_case)  # type: ignore[arg-type]

    def disturbed(pipe: Any) -> None:
        original = pipe.predict
        pipe.predict = lambda inner, *rest: (
            original(inner, *rest) + len(inner.transformer.proj_out._forward_hooks)
        )

    path = tmp_path / "t.safetensors"
    with pytest.raises(TruestepError, match="tracing changed the output"):
        record_trace(case, path=path, apply=disturbed)
    assert list(tmp_path.iterdir()) == []
    recording, checked = record_trace(
        case, path=path, apply=disturbed, check_untraced=False, steps=(0,), level="full"
    )
    assert checked is None
    assert recording.path == path

"""A command whose process is ended by other code has judged nothing: exit 1, never 0."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.commands import Run, command, runner, write_cases
from truestep import check, cli, guard, record
from truestep.case import load_cases
from truestep.errors import ProcessEndedError
from truestep.recording.store import DEFAULT_ROOT, Store, place_of
from truestep.replay.functions import check_function, record_function
from truestep.verdict import Results, Verdict

GUARDED = """
import ctypes, os, signal, sys, threading, time
from truestep.cli.ended import report
from truestep.guard import run
sys.argv = ["truestep", "check", "three", "--json", "r.json"]
def verb():
{body}
sys.exit(run(verb, report))
"""


def guarded(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a verb of this body in a guarded process of its own."""
    code = GUARDED.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130])
def test_the_exit_code_of_a_verb_that_has_ended_is_passed_on(tmp_path: Path, code: int) -> None:
    assert guarded(tmp_path, f"return {code}").returncode == code
    assert guarded(tmp_path, "return 256").returncode == 255


ENDS = {
    "os._exit(0)": "the process ended itself with exit status 0",
    "os._exit(3)": "the process ended itself with exit status 3",
    "os.execv('/bin/true', ['true'])": "the process ended itself with exit status 0",
    "os.kill(os.getpid(), signal.SIGKILL)": "SIGKILL ended the process",
    "os.kill(os.getpid(), signal.SIGABRT)": "SIGABRT ended the process",
    "ctypes.string_at(0)": "SIGSEGV ended the process",
    "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(30)": "exit status 0",
    "os.closerange(3, 64); os._exit(0)": "exit status 0",
    "[os.write(fd, bytes(99)) for fd in range(3, 9) if os.path.exists(f'/proc/self/fd/{fd}') "
    "and 'pipe' in os.readlink(f'/proc/self/fd/{fd}')]; os._exit(0)": "exit status 0",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_is_ended_is_invalid_however_it_is(tmp_path: Path, how: str) -> None:
    (tmp_path / "r.json").write_text('{"verdict": "identical"}')  # of an earlier run
    done = guarded(tmp_path, f"{how}\nreturn 0")
    assert done.returncode == 1
    assert done.stderr.startswith("ProcessEndedError: invalid: ")
    assert ENDS[how] in done.stderr
    assert "before anything was judged" in done.stderr
    assert "peak memory 0." in done.stderr
    assert "hint: truestep check three --json r.json" in done.stderr
    results = Results.model_validate_json((tmp_path / "r.json").read_text())
    assert results.verdict is Verdict.INVALID
    assert results.exit_code == 1
    assert ENDS[how] in results.comparisons[0].sentence


def test_what_ends_the_process_after_the_verdict_does_not_change_it(tmp_path: Path) -> None:
    assert (
        guarded(tmp_path, "import atexit; atexit.register(os._exit, 0); return 1").returncode == 1
    )
    assert (
        guarded(tmp_path, "import atexit; atexit.register(os._exit, 9); return 0").returncode == 0
    )


def test_a_process_that_was_forked_meanwhile_says_nothing(tmp_path: Path) -> None:
    body = "if os.fork() == 0: return 0\nos.wait(); return 1"
    assert guarded(tmp_path, body).returncode == 1
    began = time.monotonic()
    with (tmp_path / "err").open("w") as err:  # a pipe would be waited for until both are gone
        code = GUARDED.format(
            body="    if os.fork() == 0:\n        time.sleep(30); return 0\n    os._exit(0)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=err, stderr=err)
    assert done.returncode == 1
    assert time.monotonic() - began < 30  # and nobody waited for the other one
    assert "exit status 0" in (tmp_path / "err").read_text()


def test_a_crash_says_where(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import ctypes\ndef crash():\n    ctypes.string_at(0)\n")
    done = guarded(tmp_path, "sys.path.insert(0, '.')\nimport mine\nmine.crash()")
    assert "mine.py:3, in crash" in done.stderr


def test_a_signal_reaches_the_verb_once(tmp_path: Path) -> None:
    """Ctrl-C goes to parent and child, and the parent's is passed on."""
    body = """
    times = []
    while True:
        try:
            print("ready", flush=True)
            time.sleep(1.0 if times else 30)
            return len(times)
        except KeyboardInterrupt:
            times.append(1)
    """
    code = GUARDED.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 1
    process.stdout.close()


def test_a_killed_parent_takes_the_verb_along(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent has died")
    code = GUARDED.format(body="    print(os.getpid(), flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_where_it_cannot_fork_the_verb_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.fork")
    assert guard.run(lambda: 3, lambda ended: 1) == 3


def test_no_verb_ends_by_system_exit() -> None:
    """Only so is a SystemExit that arrives another's, and `invalid`."""
    folder = Path(cli.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "__init__.py":
            continue
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Call)]  # fmt: skip
        assert not {"sys.exit", "exit", "quit", "SystemExit"} & set(calls), path


CHANGE = """
import os, signal, sys

def ends(pipe):
    sys.exit(0)

def stage_ends(pipe):
    pipe.update = lambda *given, **named: sys.exit(0)

def prepare_ends(pipe):
    pipe.prepare = lambda *given, **named: sys.exit(0)

def prepare_raises(pipe):
    pipe.prepare = lambda *given, **named: {}["nothing"]

def kills(pipe):
    pipe.update = lambda *given, **named: os._exit(0)
"""


@pytest.fixture(scope="module")
def folder(tiny_wan: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases, references of both, and changes that end the process."""
    folder = tmp_path_factory.mktemp("ends")
    write_cases(folder, tiny_wan["wan21"], "a", "b")
    (folder / "change.py").write_text(CHANGE)
    (folder / "script.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "gone.py").write_text("import os\nos._exit(0)\n")
    for case in load_cases(folder / "truestep.toml").values():
        recording = record(case, floor="none")
        Store(folder / DEFAULT_ROOT).save(recording, place_of(recording))
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in that folder, in this process."""
    monkeypatch.chdir(folder)
    return runner(monkeypatch, capsys)


@pytest.mark.parametrize("change", ["ends", "stage_ends", "prepare_ends", "prepare_raises"])
@pytest.mark.parametrize("depth", ["steps", "final"])
def test_check_calls_it_invalid_and_goes_on(run: Run, change: str, depth: str) -> None:
    code, out, _ = run("check", "all", "--depth", depth, "--apply", f"change.py:{change}", "--json")
    results = Results.model_validate_json(out)
    assert code == results.exit_code == 1
    assert [c.verdict for c in results.comparisons] == [Verdict.INVALID] * 2
    cause = "KeyError: 'nothing'" if change == "prepare_raises" else "SystemExit: 0"
    assert cause in results.comparisons[0].sentence


VERBS = {
    "check": ["check", "a"],
    "ab": ["ab", "a", "--rounds", "4"],
    "record": ["record", "a", "--update"],
    "run": ["run", "a"],
    "trace record": ["trace", "record", "a"],
    "trace batch": ["trace", "batch", "a"],
    "doctor": ["doctor", "--recipe", "a"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_is_ended_with_0_by_the_file_of_a_change(folder: Path, verb: str) -> None:
    for name, cause in (("script", "SystemExit: 0"), ("gone", "exit status 0")):
        done = command(*VERBS[verb], "--apply", f"{name}.py:f", cwd=folder)
        assert done.returncode == 1
        assert done.stderr.startswith("ProcessEndedError: invalid: ")
        assert cause in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_is_ended_with_0_by_a_stage(folder: Path, verb: str) -> None:
    change = "ends" if verb in ("doctor", "trace batch") else "kills"
    done = command(*VERBS[verb], "--apply", f"change.py:{change}", cwd=folder)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("ProcessEndedError: invalid: ")


def test_the_library_never_lets_it_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    case = load_cases(folder / "truestep.toml")["a"]

    def ends(pipe: object) -> None:
        sys.exit(0)

    def stage_ends(pipe: object) -> None:
        pipe.make_latent = ends  # type: ignore[attr-defined]

    with pytest.raises(ProcessEndedError, match=r"the change .*ends ended the process"):
        record(case, apply=ends)  # type: ignore[arg-type]
    with pytest.raises(ProcessEndedError, match=r"ended the process \(SystemExit: 0\)"):
        record(case, apply=stage_ends)  # type: ignore[arg-type]
    path = next((folder / DEFAULT_ROOT).rglob("*.safetensors"))
    result = check(load_cases(folder / "truestep.toml")["a"], path, apply=ends)  # type: ignore[arg-type]
    assert result.verdict in (Verdict.INVALID, Verdict.INCOMPARABLE)


def test_functions_that_end_the_process() -> None:
    import torch

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def ends(x: torch.Tensor) -> torch.Tensor:
        sys.exit(0)

    samples = [{"x": torch.arange(4.0)}]
    with pytest.raises(ProcessEndedError, match="the function ended the process"):
        record_function(ends, samples)
    result = check_function(ends, record_function(double, samples))
    assert result.verdict is Verdict.INVALID
    assert "SystemExit: 0" in result.notes[0]


def test_an_interrupt_is_130_at_once_and_one_line(folder: Path) -> None:
    for number, code, word in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
    ):
        (folder / "waits.py").write_text(
            "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "truestep", "check", "a", "--apply", "waits.py:f"],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 10
        assert process.returncode == code
        again = "truestep check a --apply waits.py:f"
        assert err.strip() == f"{word}: nothing was written; to go on: {again}"


def test_an_interrupted_experiment_goes_on_with_resume(folder: Path, run: Run) -> None:
    (folder / "stops.py").write_text(
        "import os, signal\n"
        "def stops(pipe):\n"
        "    pipe.update = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    code, _, err = run("ab", "a", "--rounds", "4", "--apply", "stops.py:stops", "--output", "res")
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted: kept: res/ (")
    again = err.splitlines()[-1].partition("to go on: ")[2]
    assert again == "truestep ab a --rounds 4 --apply stops.py:stops --output res --resume"


def test_an_unforeseen_error_is_one_message_and_never_a_verdict(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: object, **named: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("truestep.replay.record.record", breaks)
    code, _, err = run("record", "a", "--update")
    assert code == 2
    assert "raised ZeroDivisionError: a fault of ours" in err
    assert "hint: TRUESTEP_TRACEBACK=1 truestep record a --update" in err
    assert "Traceback" not in err
    monkeypatch.setenv("TRUESTEP_TRACEBACK", "1")
    assert "Traceback" in run("record", "a", "--update")[2]


def test_parity_run_does_not_take_an_earlier_ledger_for_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_gone.py").write_text(
        "import os\nimport pytest\n\n@pytest.mark.parity\ndef test_it():\n    os._exit(0)\n"
    )
    code, _, err = runner(monkeypatch, capfd)("parity", "run", ".")
    assert code == 1
    assert "ended pytest before its session was over" in err


def test_the_json_of_a_process_that_was_ended_is_on_stdout_where_asked(tmp_path: Path) -> None:
    code = GUARDED.replace('"r.json"', '"-"').format(body="    os._exit(0)")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["verdict"] == "invalid"

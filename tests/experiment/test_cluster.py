"""Tasks on a Ray cluster of this machine: cells, cases, lost workers, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest

from tests.commands import Run, runner, write_cases
from truestep.cli.common import load_change
from truestep.errors import MissingExtraError, UsageError
from truestep.experiment.cluster import Ended, Task, connected, run_tasks
from truestep.experiment.records import ARMS, Experiment
from truestep.verdict import Verdict

CHANGES = """
import os, signal, time
from pathlib import Path

def fused(pipe):
    pipe.transformer.fuse_qkv_projections()

def deadly(pipe):
    if pipe.settings.seed == 1 or pipe.settings.guidance_scale == 3.0:
        os.kill(os.getpid(), signal.SIGKILL)

def deadly_once(pipe):
    decode = pipe.decode
    def mortal(inner, latent):
        samples, died = Path("results/eager/as-is/samples.jsonl"), Path("died")
        if samples.exists() and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(inner, latent)
    pipe.decode = mortal

def slow_while_marked(pipe):
    decode = pipe.decode
    def later(inner, latent):
        time.sleep(0.5 if Path("slow").exists() else 0)
        return decode(inner, latent)
    pipe.decode = later
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster with two CPUs and what Ray takes for an H200."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    resources = {"CPU": 2, "GPU": 1, "accelerator_type:H200": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps(resources))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own
        with connected("local"):
            import ray  # not earlier: it reads what it may print when it is imported
            from ray import cloudpickle

            cloudpickle.register_pickle_by_value(sys.modules[__name__])
            yield
    assert not ray.is_initialized()


@pytest.fixture
def folder(tiny_wan: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a case file and changes, to run in."""
    write_cases(tmp_path, tiny_wan["wan21"], "a", "b")
    (tmp_path / "change.py").write_text(CHANGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def truestep(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Run a verb; what other threads and processes print is captured too."""
    return runner(monkeypatch, capfd)


def _where() -> tuple[int, str, str, int]:
    import torch

    device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return os.getpid(), str(Path.cwd()), device, torch.get_num_threads()


def _killed_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _killed(log: Path) -> None:
    with log.open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def _raising() -> None:
    raise UsageError("no such thing", hint="another")


# These come first: the cluster of the others is not there yet.


def test_without_ray_one_sentence_says_so(
    truestep: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="'ray', which is not installed"):
        connected("local").__enter__()
    for arguments in (("ab", "a", "--set", "steps=3"), ("check", "a")):
        code, out, err = truestep(*arguments, "--ray", "local")
        assert (code, out) == (2, "")
        assert err == (
            "MissingExtraError: --ray needs the package 'ray', which is not installed\n\n"
            "hint: pip install 'truestep[ray]'\n"
        )
    assert not (folder / "truestep-ab").exists()


def test_what_cannot_be_meant_is_refused(truestep: Run, folder: Path) -> None:
    for arguments in (("ab", "a", "--set", "steps=3"), ("check", "a")):
        code, _, err = truestep(*arguments, "--accelerator", "H200")
        assert code == 2
        assert "--accelerator needs --ray" in err
    code, _, err = truestep("check", "a", "--ray", "127.0.0.1:1")
    assert code == 2
    assert err.startswith("UsageError: there is no Ray cluster at 127.0.0.1:1\n")


def test_a_change_is_read_anew_on_the_worker(folder: Path) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(partial(load_change, "change.py:fused")))
    change = again()
    assert change is not None
    assert change.__name__ == "fused"


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_what_it_measured_and_leaves_no_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    arguments = (
        "ab", "a", "--apply", "change.py:slow_while_marked", "--rounds", "4",
        "--matrix", "guidance_scale=3.0,5.0", "--output", "results",
    )  # fmt: skip
    (folder / "slow").touch()
    mark = uuid.uuid4().hex
    child = subprocess.Popen(
        [sys.executable, "-m", "truestep", *arguments, "--ray", "local", "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as a terminal gives it
        env={**os.environ, "TRUESTEP_TEST_MARK": mark, "OMP_NUM_THREADS": "1"},
    )

    def measured() -> dict[Path, list[bytes]]:
        files = folder.glob("results/eager/*/samples.jsonl")
        return {file: file.read_bytes().splitlines() for file in files}

    deadline = time.monotonic() + 300
    while not any(len(lines) > 2 for lines in measured().values()):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "interrupted: kept: results/ (" in err
    assert err.endswith(" --resume\n")
    assert "of 4 rounds" in out
    kept = measured()
    assert sum(len(lines) for lines in kept.values()) < 48
    while found := _processes_with(mark):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    assert measured() == kept
    (folder / "slow").unlink()
    _, out, _ = runner(monkeypatch, capfd)(*arguments, "--resume", "--json")
    cells = Experiment.model_validate_json(out).cells
    assert [cell.missing for cell in cells] == [(), ()]
    for file, lines in measured().items():
        before = kept.get(file, [])
        whole = before[:-1]  # the last one may have been cut short
        assert lines[: len(whole)] == whole


def _processes_with(mark: str) -> list[str]:
    """Command lines of the processes whose environment holds a word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " ")[:100])
    return found


@pytest.mark.slow
def test_an_interrupt_that_something_swallowed_still_stops(cluster: None) -> None:
    tasks = {"first": Task(time.sleep, (0.0,)), "second": Task(time.sleep, (60.0,))}
    before = signal.getsignal(signal.SIGINT)
    endings = run_tasks(tasks)
    assert next(endings).name == "first"
    with suppress(KeyboardInterrupt):  # as a callback that is no business of ours would
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(endings)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_lost_worker_is_retried_and_a_poisoned_task_leaves_the_others(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = {
        "poison": Task(_killed, (tmp_path / "log",)),
        "once": Task(_killed_once, (tmp_path / "marker",)),
        "raising": Task(_raising),
        "one": Task(_where),
        "two": Task(_where),
    }
    ended = {end.name: end for end in run_tasks(tasks, max_retries=1)}
    assert set(ended) == set(tasks)
    assert ended["once"] == Ended("once", "alive")
    assert ended["poison"].lost
    assert str(ended["poison"].error).startswith("its worker was lost 2 times")
    assert (tmp_path / "log").read_text() == "xx"
    error = ended["raising"].error
    assert isinstance(error, UsageError)
    assert (error.what, error.hint, ended["raising"].lost) == ("no such thing", "another", False)
    one, two = ended["one"].value, ended["two"].value
    assert one[0] != two[0]
    assert one[1:] == two[1:] == (str(tmp_path), "", 1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_an_accelerator_is_asked_for_by_its_type(cluster: None) -> None:
    with connected("local", accelerator="H200"):
        (end,) = run_tasks({"one": Task(_where)}, accelerator="H200")
    assert end.value[2] == "0"
    with pytest.raises(UsageError, match="accelerator of type 'B200'") as caught:
        connected("local", accelerator="B200").__enter__()
    assert caught.value.measured == "it has: H200"


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(cluster: None, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("this")
    (end,) = run_tasks({"one": Task(_where)}, shared={plan: b"this", tmp_path: None})
    assert end.error is None
    for shared in ({plan: b"that"}, {tmp_path / "absent": None}):
        with pytest.raises(UsageError, match="does not see the files") as caught:
            list(run_tasks({"one": Task(_where)}, shared=shared))
        assert caught.value.where == str(next(iter(shared)))


@pytest.mark.slow
def test_cells_run_as_tasks_and_a_poisoned_one_is_its_own_failure(
    cluster: None, truestep: Run, folder: Path
) -> None:
    arguments = ("ab", "a", "--apply", "change.py:deadly", "--rounds", "1", "--output", "results")
    code, out, _ = truestep(
        *arguments, "--matrix", "guidance_scale=3.0,5.0", "--ray", "local", "--json"
    )
    assert code == 1
    poisoned, other = Experiment.model_validate_json(out).cells
    assert poisoned.verdict is Verdict.INVALID
    assert poisoned.reasons == ("the candidate raised while loading: its worker was lost 3 times",)
    assert other.speed is not None
    assert (other.speed.rounds, other.missing, other.sameness is not None) == (1, (), True)
    assert {sample.arm for sample in other.samples} == set(ARMS)
    environment = json.loads((folder / "results" / "environment.json").read_text())
    assert environment["torch.threads"] == "1"
    assert not list(folder.rglob("doing.json"))


@pytest.mark.slow
def test_a_cell_whose_worker_was_lost_goes_on_where_it_was(
    cluster: None, truestep: Run, folder: Path
) -> None:
    code, out, _ = truestep(
        "ab", "a", "--apply", "change.py:deadly_once", "--rounds", "2", "--output", "results",
        "--ray", "local", "--accelerator", "H200", "--json",
    )  # fmt: skip
    (cell,) = Experiment.model_validate_json(out).cells
    assert (folder / "died").exists()
    assert cell.missing == ()
    assert cell.speed is not None
    assert cell.speed.rounds == 2
    sessions = [sample.session for sample in cell.samples]
    assert sessions == [0] * sessions.count(0) + [1] * 12
    assert 1 <= sessions.count(0) <= 5
    assert code in (0, 4)  # two rounds decide nothing about the speed


@pytest.mark.slow
def test_a_compiled_cell_runs_as_a_task(cluster: None, truestep: Run) -> None:
    if which("g++") is None:
        pytest.skip("torch.compile needs a compiler")
    code, out, _ = truestep(
        "ab", "a", "--apply", "change.py:fused", "--rounds", "1", "--matrix", "compile=off,on",
        "--output", "results", "--ray", "local", "--json",
    )  # fmt: skip
    eager, compiled = Experiment.model_validate_json(out).cells
    assert (eager.cell.compile, compiled.cell.compile) == (False, True)
    for cell in (eager, compiled):
        assert cell.missing == ()
        assert cell.sameness is not None
        assert cell.sameness.passed
        assert cell.speed is not None
        assert cell.speed.rounds == 1
    assert code == 4  # one round decides nothing about the speed


def beside_progress(err: str) -> list[str]:
    """Lines of stderr without those of a slow machine's progress."""
    return [line for line in err.splitlines() if not line.startswith("cases: ")]


@pytest.mark.slow
def test_cases_are_checked_as_tasks(cluster: None, truestep: Run) -> None:
    assert truestep("record", "a", "b", "--floor", "none")[0] == 0  # they are identical
    code, out, err = truestep("check", "--apply", "change.py:fused", "--ray", "local")
    assert (code, beside_progress(err)) == (0, [])
    assert out.splitlines()[0] == "2 cases: 2 identical"
    code, out, err = truestep("check", "--apply", "change.py:deadly", "--ray", "local")
    assert code == 2
    assert out.count("PASSED") == 1
    told = beside_progress(err)
    assert told[0].startswith("BROKEN b: TruestepError: its worker was lost 3 times")

"""`truestep bisect` as it is typed: its answer, its JSON, killed and gone on with, on a real
check."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.commands import Captured, Run, flat, runner
from tests.experiment.test_bisect_commits import git, repository
from truestep.experiment.bisecting.packages import local_files
from truestep.experiment.bisecting.records import Bisection
from truestep.report.bisect import _allowed, _telling

PYTHON = sys.executable


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Run:
    """The verb, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys, "bisect")


def test_the_answer_comes_first_and_the_next_command_last(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shas = repository(
        tmp_path / "repo", [0, 0, 1, 1], more="print('FAILED drifted: by 3 x' if value.X else 'ok')"
    )
    monkeypatch.chdir(tmp_path / "repo")
    code, out, err = run("--good", shas[0], "--bad", "HEAD", "--", PYTHON, "check.py")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == f"FOUND commit {shas[2][:12]} 'number 2' did it (value.py)"
    assert "  bad          FAILED drifted: by 3 x" in lines
    assert "  good         ok" in lines
    assert f"next: git show {shas[2][:12]}" in lines
    assert lines[-1].startswith("repeat: truestep bisect --good ")


def test_of_the_bad_side_the_place_and_the_cause_are_told() -> None:
    said = ("FAILED drifted: 3 of 48", "  case a", "  cause      a gain of 1.03", "  tensor x")
    assert _telling(said) == ["FAILED drifted: 3 of 48", "(cause a gain of 1.03)"]
    assert _telling(("ok",)) == ["ok"]
    assert _telling(()) == []


def test_json_fits_the_schema(tmp_path: Path, run: Run) -> None:
    import jsonschema

    command = (PYTHON, "-c", "import os, sys; sys.exit(int(os.environ['N']) > 3)")
    code, out, err = run("--env", "N=1..9", "--json", "-", "--", *command)
    assert code == 0, err
    result = json.loads(out)
    schema = Path(__file__).parents[2] / "docs" / "schema" / "bisect-1.json"
    jsonschema.validate(result, json.loads(schema.read_text()))
    assert result["sentence"] == "N=4 did it; 3 is good"
    assert result["probes"] == len(result["attempts"])


def test_brief_is_small_and_names_the_culprit(tmp_path: Path, run: Run) -> None:
    command = (PYTHON, "-c", "import os, sys; sys.exit('F' in os.environ)")
    code, out, err = run("--env", "F=..1", "--env", "G=a..b", "--brief", "-", "--", *command)
    assert code == 0, err
    brief = json.loads(out)
    assert (brief["verdict"], brief["exit_code"]) == ("found", 0)
    assert brief["sentence"] == "F ((unset) to 1) did it"


def test_two_variables_that_do_it_together(tmp_path: Path, run: Run) -> None:
    code, out, _ = run(
        *("--env", "A=0..1", "--env", "B=0..1", "--env", "C=0..1", "--", PYTHON, "-c"),
        "import os, sys; sys.exit(os.environ['A'] == os.environ['C'] == '1')",
    )
    assert code == 0
    assert flat(out).startswith("FOUND A (0 to 1) and C (0 to 1) together did it: none of them")


def test_a_command_that_is_not_steady_is_undecided(tmp_path: Path, run: Run) -> None:
    state = tmp_path / "state"
    program = f"import sys, pathlib; p = pathlib.Path({str(state)!r}); n = p.exists(); "
    program += "p.unlink() if n else p.touch(); sys.exit(n)"
    code, out, _ = run("--env", "A=0..1", "--env", "B=0..1", "--", PYTHON, "-c", program)
    assert code == 4
    assert out.startswith("UNDECIDED ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--", "true"), "give one of --good and --bad, --packages, --env, --weights"),
        (("--good", "a", "--env", "A=0..1", "--", "true"), "give one of"),
        (("--good", "a", "--", "true"), "--bad is missing: both ends are needed"),
        (("--env", "A=0..1", "--import", "x", "--", "true"), "--import is of commits"),
        (("--env", "A=0..1", "--keep", "PATH", "--", "true"), "--keep PATH: it is not fresh"),
        (("--env", "A=0..1"), "Missing argument"),
        (("--weights", "a..b", "--", "true"), "--weights needs two files of tensors"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Run, words: tuple[str, ...], message: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert message in flat(err)


def test_ends_that_are_exchanged_are_told_with_the_command(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path / "repo", [0, 1])
    monkeypatch.chdir(tmp_path / "repo")
    code, _, err = run("--good", "HEAD", "--bad", "HEAD~1", "--", PYTHON, "check.py")
    assert code == 2
    words = shlex.split(err.rpartition("hint: truestep bisect ")[2])
    assert words == ["--good", "HEAD~1", "--bad", "HEAD", "--", PYTHON, "check.py"]
    code, out, _ = run(*words)
    assert code == 0
    assert out.startswith("FOUND commit ")


def test_one_run_is_one_run() -> None:
    result = Bisection.model_construct(probes=1, limit=6)
    assert _allowed(result) == "1 run of the command, 6 allowed"
    assert _allowed(result.model_copy(update={"probes": 2})).startswith("2 runs of the command")


BUSY = """
import pathlib, time
with open({runs!r}, "a") as file: file.write("x")
if len(open({runs!r}).read()) == 7: time.sleep(60)
"""


def test_a_bisect_that_was_killed_goes_on_where_it_stood(tmp_path: Path) -> None:
    """SIGKILL in the seventh probe: of the six before it only the repeats of the ends are run
    again, and nothing is left."""
    runs = tmp_path / "runs"
    repo = tmp_path / "repo"
    shas = repository(repo, [0] * 5 + [1] * 4, more=BUSY.format(runs=str(runs)))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = [PYTHON, "-m", "truestep", "bisect", "--good", shas[0], "--bad", shas[-1]]
    words += ["--json", "-", "--", PYTHON, "check.py"]
    variables = {**os.environ, "TMPDIR": str(temporary)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=repo, env=variables, start_new_session=True, **pipes)
    for _ in range(600):
        if runs.exists() and len(runs.read_text()) >= 7:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(runs.read_text()) == 7
    assert list(temporary.glob("truestep-bisect-*"))
    done = subprocess.run(
        words, cwd=repo, env=variables, capture_output=True, text=True, check=False
    )
    result = json.loads(done.stdout)
    assert result["culprits"][0]["name"] == shas[5], done.stderr
    assert result["notes"][0] == "4 answers are of an earlier start, which was stopped"
    assert [attempt["resumed"] for attempt in result["attempts"]].count(True) == 4
    assert len(runs.read_text()) == result["probes"] + 3, "the killed one, two repeats: run twice"
    assert not list(temporary.glob("truestep-bisect-*"))
    assert git(repo, "worktree", "list").count("\n") == 0


def weights(folder: Path, *, moved: str = "") -> None:
    """Two components of several blocks; one tensor is moved, all others by a rounding."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "vae").mkdir()
    names = [f"blocks.{n}.attn.{x}.weight" for n in range(9) for x in "qkv"]
    off = 1e-6 if moved else 0.0
    tensors = {name: np.full((2, 2), off, np.float32) for name in names}
    if moved:
        tensors[moved] = tensors[moved] + np.float32(1)
    save_file(tensors, folder / "transformer" / "model.safetensors", {"format": "pt"})
    save_file({"x": np.ones(3, np.float32)}, folder / "vae" / "model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps({"scale": off}))


READ = """
import json, sys
from safetensors.numpy import load_file
found = load_file(sys.argv[1] + "/transformer/model.safetensors")
assert len(found) == 27 and load_file(sys.argv[1] + "/vae/model.safetensors")["x"].sum() == 3
sys.exit(int(max(abs(v).max() for v in found.values()) > 0.5))
"""


@pytest.mark.slow
def test_the_tensor_that_does_it_is_named(tmp_path: Path, run: Run) -> None:
    name = "blocks.7.attn.k.weight"
    weights(tmp_path / "good")
    weights(tmp_path / "bad", moved=name)
    (tmp_path / "read.py").write_text(READ)
    code, out, err = run("--weights", "good..bad", "--", PYTHON, "read.py", "{weights}")
    assert code == 0, err
    assert out.startswith(f"FOUND transformer/{name} (1 tensor) did it\n")


@pytest.mark.slow
def test_the_version_that_does_it_is_named(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder of wheels, which stands for the index; no version is installed for good."""
    for number in range(6):
        wheel(tmp_path, f"0.4{number}.0", f"X = {number}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    program = "import tinylib, sys; sys.exit(tinylib.X > 3)"
    code, out, err = run("--packages", "tinylib==0.40..0.45", "--", PYTHON, "-c", program)
    assert code == 0, err
    assert out.startswith("FOUND tinylib 0.44.0 did it; 0.43.0 is good\n")
    gone = subprocess.run([PYTHON, "-c", "import tinylib"], capture_output=True, check=False)
    assert gone.returncode == 1


@pytest.mark.slow
def test_a_version_that_was_built_again_is_installed_again(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that stands for the index by its content; elsewhere where --again is said."""
    for number in range(4):
        wheel(tmp_path, f"{number}.0", f"X = {number}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", tmp_path.as_uri())
    program = "import tinylib, sys; sys.exit(tinylib.X > 2)"
    words = ("--packages", "tinylib==0.0,1.0,2.0,3.0", "--", PYTHON, "-c", program)
    for _ in range(2):
        assert run(*words)[1].startswith("FOUND tinylib 3.0 did it; 2.0 is good\n")
    overlays = tmp_path / ".truestep" / "bisect" / "overlays"
    before = {path: path.stat().st_ino for path in overlays.iterdir()}
    assert run(*words)[0] == 0
    assert {path: path.stat().st_ino for path in overlays.iterdir()} == before
    wheel(tmp_path, "2.0", "X = 9")
    assert run(*words)[1].startswith("FOUND tinylib 2.0 did it; 1.0 is good\n")
    made = {path.name for path in overlays.iterdir()}
    assert made > {path.name for path in before}
    for path in overlays.glob("*/tinylib.py"):
        path.write_text("X = 0")
    assert run("--again", *words)[1].startswith("FOUND tinylib 2.0 did it; 1.0 is good\n")


@pytest.mark.parametrize(
    ("file", "is_of"),
    [
        ("Tiny_Lib-1.0-py3-none-any.whl", True),
        ("tiny_lib-1.0+cpu-py3-none-any.whl", True),
        ("tiny-lib-1.0.0.tar.gz", True),
        ("tiny_lib-1.0.1-py3-none-any.whl", False),
        ("tiny_lib_more-1.0-py3-none-any.whl", False),
        ("tiny-lib-1.0.txt", False),
    ],
)
def test_the_files_of_a_version_in_a_local_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, is_of: bool
) -> None:
    (tmp_path / file).touch()
    assert local_files("tiny-lib", "1.0") == []
    monkeypatch.setenv("PIP_FIND_LINKS", f"https://x.y/z {tmp_path}")
    assert local_files("tiny-lib", "1.0") == ([tmp_path / file] if is_of else [])


def wheel(folder: Path, version: str, code: str) -> None:
    info = f"tinylib-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: tinylib\nVersion: {version}\n"
    form = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"tinylib.py": code, f"{info}/METADATA": about, f"{info}/WHEEL": form}
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(folder / f"tinylib-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


RECORD = """
import sys, torch, truestep
import model
samples = [{"x": torch.arange(6.0).reshape(2, 3)}]
truestep.record_function(model.f, samples, path=sys.argv[1])
"""

CHECK = """
import sys
import model, truestep
comparison = truestep.check_function(model.f, sys.argv[1])
print(("PASSED " if comparison.exit_code == 0 else "FAILED ") + comparison.sentence)
sys.exit(comparison.exit_code)
"""


@pytest.mark.slow
def test_a_real_check_finds_the_commit_that_drifted(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "repo"
    factors = ["2.0", "2.0 + 0.0", "4.0 / 2.0", "2.1", "2.1 + 0.0"]
    shas = repository(
        repo,
        [f"def f(x):\n    return (x * ({factor})).sin()\n" for factor in factors],
        name="model",
        file="model.py",
    )
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "check.py").write_text(CHECK)
    git(repo, "checkout", "--quiet", shas[0])
    reference = tmp_path / "reference.safetensors"
    subprocess.run(
        [PYTHON, str(tmp_path / "record.py"), str(reference)],
        check=True, cwd=repo, env={**os.environ, "PYTHONPATH": _path(repo)},
    )  # fmt: skip
    git(repo, "checkout", "--quiet", "main")
    monkeypatch.chdir(repo)
    command = (PYTHON, str(tmp_path / "check.py"), str(reference))
    code, out, err = run("--good", shas[0], "--bad", "main", "--", *command)
    assert code == 0, out + err
    assert out.startswith(f"FOUND commit {shas[3][:12]} ")
    assert "FAILED drifted" in out


def _path(repo: Path) -> str:
    return os.pathsep.join([str(repo), os.environ.get("PYTHONPATH", "")])

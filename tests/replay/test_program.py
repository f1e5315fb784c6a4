"""Programs that are traced without being changed, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import COLD
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.replay.program import SITE, VARIABLE, Request, output_path, parse

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.replay.models import Mlp, Model, given
torch.manual_seed(0)
encoder, net, other = Mlp(), Model(), Model()
with torch.no_grad():
    x = encoder(given())
    for _ in range(2):
        y = net(x)
    z = other(x)
print(float(y.sum() + z.sum()), sys.argv[1:])
if "fail" in sys.argv:
    raise SystemExit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(PROGRAM.format(root=str(ROOT)))
    return path


def run(
    *command: str | Path, folder: Path, trace: str | None = None, path: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **env,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SITE), path))),
    }
    environment.pop(VARIABLE, None)
    if trace is not None:
        environment[VARIABLE] = trace
    return subprocess.run(
        list(map(str, command)),
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def fqns(path: Path) -> list[str]:
    return sorted({str(entry.fqn) for entry in Recording.open(path).manifest.tensors})


@pytest.mark.parametrize("env", [{COLD: "1"}, {}], ids=["torch is imported later", "at once"])
def test_the_first_model_of_a_class(env: dict[str, str], script: Path, tmp_path: Path) -> None:
    plain = run(sys.executable, script, "a", folder=tmp_path)
    traced = run(
        sys.executable, script, "a", folder=tmp_path,
        trace="blocks.?,(root);class=Mod*;level=full;inputs=1;steps=0,1", **env,
    )  # fmt: skip
    assert (traced.stdout, traced.returncode) == (plain.stdout, 0)
    assert "tracing Model: 3 of 9 modules" in traced.stderr
    recording = Recording.open(tmp_path / "trace.safetensors")
    assert fqns(tmp_path / "trace.safetensors") == ["(root)", "blocks.0", "blocks.1"]
    names = [entry.name for entry in recording.manifest.tensors]
    assert names[0] == "module/(root)/0/main/in.0"  # of the very first call
    assert names[-1] == "module/(root)/1/main/out.0"
    assert sum(name.startswith("module/(root)/") for name in names) == 4  # not of the other model
    assert recording.manifest.settings["model"] == "Model"


def test_every_model_under_its_class(script: Path, tmp_path: Path) -> None:
    traced = run(sys.executable, script, folder=tmp_path, trace="*;output=new/t.safetensors")
    assert traced.returncode == 0
    found = fqns(tmp_path / "new" / "t.safetensors")
    assert {"Mlp", "Mlp.up", "Model", "Model.blocks.0.up", "Model_2", "Model_2.out"} <= set(found)


def test_a_program_that_fails_is_traced_and_fails(script: Path, tmp_path: Path) -> None:
    traced = run(sys.executable, script, "fail", folder=tmp_path, trace="*;class=Model")
    assert traced.returncode == 7
    assert Recording.open(tmp_path / "trace.safetensors").manifest.forwards == 2


def test_without_the_variable_nothing_happens(script: Path, tmp_path: Path) -> None:
    assert run(sys.executable, script, folder=tmp_path).stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["run.py"]


def test_a_hidden_sitecustomize_still_runs(script: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("print('theirs', __file__)")
    traced = run(sys.executable, script, folder=tmp_path, trace="*;class=Model", path=str(other))
    assert traced.stdout.startswith(f"theirs {other}")
    assert (tmp_path / "trace.safetensors").exists()


def test_as_a_module(script: Path, tmp_path: Path) -> None:
    traced = run(
        sys.executable, "-m", "truestep.replay.program", script, "b", folder=tmp_path,
        trace="*;class=Model",
    )  # fmt: skip
    assert traced.returncode == 0, traced.stderr
    assert traced.stdout.endswith("['b']\n")
    assert (tmp_path / "trace.safetensors").exists()
    assert run(sys.executable, "-m", "truestep.replay.program", folder=tmp_path).returncode == 2


def test_a_glob_that_matches_nothing_is_said(script: Path, tmp_path: Path) -> None:
    traced = run(sys.executable, script, folder=tmp_path, trace="nothing,out;class=Model")
    assert traced.returncode == 0
    notes = Recording.open(tmp_path / "trace.safetensors").manifest.notes
    assert "no module matched 'nothing'" in notes


def test_a_request_that_means_nothing_leaves_the_program_alone(
    script: Path, tmp_path: Path
) -> None:
    traced = run(sys.executable, script, folder=tmp_path, trace="*;depth=3")
    assert traced.returncode == 0
    assert "nothing is traced: 'depth' is no setting" in traced.stderr


def test_two_processes_do_not_write_over_each_other(script: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(
        script.read_text() + f"import subprocess\nsubprocess.run([sys.executable, {str(script)!r}])"
    )
    traced = run(sys.executable, parent, folder=tmp_path, trace="out;class=Model")
    assert traced.returncode == 0
    assert len(list(tmp_path.glob("trace*.safetensors"))) == 2


def test_a_forked_child_does_not_write(script: Path, tmp_path: Path) -> None:
    forking = tmp_path / "forking.py"
    forking.write_text(
        script.read_text().replace(
            "print(", "import os\nif os.fork() == 0:\n    net(x)\n    sys.exit()\nos.wait()\nprint("
        )
    )
    traced = run(sys.executable, forking, folder=tmp_path, trace="out;class=Model")
    assert traced.returncode == 0
    assert Recording.open(tmp_path / "trace.safetensors").manifest.forwards == 2
    assert len(list(tmp_path.glob("trace*"))) == 1


def test_requests_round_trip() -> None:
    request = Request("a.*,!b", "Wan*", True, "o.safetensors", "full", (0, 5), True, "a.b")
    assert parse(request.text()) == request
    assert parse("") == Request()
    assert parse("x;class=Y") == Request(select="x", class_name="Y", every=False)


@pytest.mark.parametrize(
    "text", ["*;depth=3", "*;level=all", "*;steps=a", "*;inputs=yes", "*;class", "*;class="]
)
def test_bad_requests(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_each_rank_has_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert output_path(Request()) == Path("trace.rank1.safetensors")

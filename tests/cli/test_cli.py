"""The command line, end to end on a tiny model: output, exit codes, errors without tracebacks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import Run, runner
from truestep.cli.app import VERBS
from truestep.verdict import Results

FILE = """
[case.three]
model = "{model}"
prompt = "a red three moving left"
steps = 4
guidance_scale = 4.0
height = 16
width = 16
num_frames = 5
max_sequence_length = 8
settings = {{ device = "cpu" }}

[case.seven]
model = "{model}"
prompt = "a green seven moving up"
steps = 4
height = 16
width = 16
num_frames = 5
max_sequence_length = 8
settings = {{ device = "cpu" }}
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def recorded(tiny_wan: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a case file and a reference of `three`."""
    from truestep import record
    from truestep.case import load_cases
    from truestep.recording.store import DEFAULT_ROOT, Store, place_of

    folder = tmp_path_factory.mktemp("project")
    (folder / "truestep.toml").write_text(FILE.format(model=tiny_wan["wan21"]))
    recording = record(load_cases(folder / "truestep.toml")["three"])
    Store(folder / DEFAULT_ROOT).save(recording, place_of(recording))
    return folder


@pytest.fixture
def project(run: Run, recorded: Path, tmp_path: Path) -> Run:
    """The command in a copy of that folder."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    return run


def test_help_lists_every_verb(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for verb in VERBS:
        assert verb in out
        assert run(verb, "--help")[0] == 0
    assert "Exit codes" in out


@pytest.mark.parametrize("verb", [(), ("gate",), ("parity",), ("perf",), ("trace",)], ids=" ".join)
def test_a_verb_alone_shows_what_it_takes(verb: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*verb)
    told = (out + err).splitlines()
    assert code in (0, 2)
    assert told[0].startswith(" ".join(("Usage: truestep", *verb)))
    assert any(line.strip() in ("Commands:", "Verbs:") for line in told), told
    assert "\\n" not in out + err


def test_check_passes_and_begins_with_the_sentence(project: Run) -> None:
    code, out, _ = project("check", "three")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "PASSED identical: 24 tensors agree bit for bit"
    assert len(lines) <= 12
    code, out, _ = project("check", "three", "-v")
    assert code == 0
    assert out.splitlines()[0] == lines[0]
    assert out.splitlines()[-1] == "repeat: truestep check three -v"


def test_a_changed_setting_fails(project: Run) -> None:
    code, out, _ = project("check", "three", "--set", "guidance_scale=4.1")
    assert code == 1
    assert "FAILED drifted" in out
    assert "first divergence: `step/0000/guided`" in out


def test_an_applied_function_fails(project: Run, tmp_path: Path) -> None:
    (tmp_path / "change.py").write_text(
        "def bias(pipeline):\n    pipeline.transformer.proj_out.bias.data += 0.01\n"
    )
    code, out, _ = project("check", "three", "--apply", "change.py:bias")
    assert code == 1
    assert "[apply bias]" in out
    code, _, err = project("check", "three", "--apply", "change.py:bia")
    assert code == 2
    assert "did you mean 'bias'?" in err
    assert project("check", "three", "--apply", "nothing.py:f")[0] == 2
    assert project("check", "three", "--apply", "change.py")[0] == 2


def test_another_model_fails(project: Run, tiny_wan: dict[str, Path]) -> None:
    code, out, _ = project("check", "three", "--model", str(tiny_wan["wan22-ti2v"]))
    assert code == 1
    assert "prediction" in out


def test_json_and_report(project: Run, tmp_path: Path) -> None:
    code, out, _ = project("check", "three", "--json")
    assert code == 0
    results = Results.model_validate_json(out)
    assert results.exit_code == 0
    code, out, _ = project("check", "three", "--json", "r.json", "--report", "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "identical"
    assert "report: r.html" in out
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()


def test_a_missing_reference_is_exit_3_and_the_others_still_run(project: Run) -> None:
    code, out, _ = project("check", "all")
    assert code == 3
    assert "\nPASSED three [unchanged]: identical" in out or "PASSED wan21" in out
    assert "\nMISSING " in out
    assert "next: truestep record seven" in out


def test_a_reference_is_not_replaced_by_accident(project: Run) -> None:
    code, _, err = project("record", "three")
    assert code == 2
    assert "a reference of this case exists" in err
    assert project("record", "three", "--update", "--floor", "none")[0] == 0
    assert project("check", "three")[0] == 0


def test_record_says_what_it_recorded(project: Run) -> None:
    code, out, _ = project("record", "seven", "--floor", "none")
    assert code == 0
    assert out.startswith("RECORDED seven: 24 tensors, 8 forwards, noise floor from 0 benign runs")
    assert project("check", "seven")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "nope"), "no case named 'nope'"),
        (("check", "three", "--set", "guidance=3"), "unknown setting 'guidance'"),
        (("check", "three", "--set", "steps=0"), "steps = '0'"),
        (("check", "three", "--set", "steps"), "--set needs KEY=VALUE"),
        (("check", "three", "--steps", "a"), "--steps needs numbers"),
        (("check", "three", "--steps", "9"), "no step 9 in the reference"),
        (("check", "three", "--set", "height=20"), "height 20 does not fit the model"),
        (("check", "three", "--set", "device=cuda:63"), "device 'cuda:63' cannot be used here"),
        (("check", "three", "--set", "device=tpu"), "settings.device = 'tpu'"),
        (("check", "three", "--model", "/nowhere"), "the model folder does not exist"),
        (("check", "three", "--model", "no-such/model"), "could not be fetched from the hub"),
        (("show", "nothing.safetensors"), "the file cannot be read"),
        (("compare", "a.npy", "b.npy"), "the file cannot be read"),
        (("frobnicate",), "No such command"),
    ],
)
def test_errors_are_clear_and_exit_2(
    arguments: tuple[str, ...], message: str, project: Run
) -> None:
    code, _, err = project(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_show_names_what_a_recording_holds(project: Run, tmp_path: Path) -> None:
    (path,) = tmp_path.glob("truestep-references/*/*/*/*.safetensors")
    code, out, _ = project("show", str(path))
    assert code == 0
    assert "prompt       a red three moving left" in out
    kinds = r"\(attention, batch, functions, (instructions, )?jitter, "
    assert re.search(rf"floor float32/float32: \d+ runs {kinds}", " ".join(out.split()))
    assert "... " in out
    code, out, _ = project("show", str(path), "--json")
    assert json.loads(out)["case"]["prompt"] == "a red three moving left"


def test_a_sketch_is_small_and_compared_but_not_replayed(project: Run, tmp_path: Path) -> None:
    (full,) = map(str, tmp_path.glob("truestep-references/*/*/*/*.safetensors"))
    arguments = ("--level", "sketch", "--floor", "none", "--output", "s.safetensors")
    code, out, _ = project("record", "three", *arguments)
    assert code == 0
    assert out.startswith("RECORDED three: 24 tensors, 8 forwards")
    code, out, _ = project("show", "s.safetensors", "-v")
    assert out.startswith("s.safetensors: a recording, 24 tensors, 0.1 MB")
    assert "level        sketch: 1,024 floats and 8 moments of each tensor" in out
    assert "step/0000/latent    float32  1x8x3x8x8" in out
    code, out, _ = project("compare", "s.safetensors", full)
    assert code == 0
    assert out.startswith("PASSED equivalent: 24 tensors, the worst at 0.5")
    _, out, _ = project("compare", "s.safetensors", full, "-v")
    assert "measured noise floor (float32/float32): drifted above" in " ".join(out.split())
    code, out, _ = project("compare", full, "s.safetensors", "--json", "--report", "r.html")
    assert code == 0
    rows = Results.model_validate_json(out).comparisons[0].rows
    assert {row.verdict.value for row in rows} == {"equivalent"}
    assert all(row.note.startswith("sketch: 0.00e+00 (0.00e+00 to ") for row in rows)
    assert project("compare", full, "s.safetensors", "--tolerance", "inf")[0] == 2
    code, _, err = project("check", "three", "--reference", "s.safetensors")
    assert code == 2
    assert "the reference holds level 'sketch' only: there are no tensors to replay" in err
    assert "hint: truestep record three --level full --update" in err
    assert project("check", "three", "--reference", "s.safetensors", "--depth", "final")[0] == 2
    assert project("record", "three", "--level", "full", "--update", "--floor", "none")[0] == 0
    changed = ("--set", "seed=1", "--output", "other.safetensors")
    assert project("record", "three", "--level", "sketch", "--floor", "none", *changed)[0] == 0
    code, out, _ = project("compare", "other.safetensors", "s.safetensors")
    assert code == 1
    assert "FAILED drifted" in out
    assert "first divergence: `latent/initial`" in out


@pytest.mark.parametrize(
    ("factor", "code", "word"),
    [(1.0, 0, "identical"), (1.01, 1, "drifted"), (float("nan"), 1, "invalid")],
)
def test_compare(factor: float, code: int, word: str, run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5).numpy()
    np.save(tmp_path / "a.npy", x * np.float32(factor))
    np.save(tmp_path / "r.npy", x)
    found, out, _ = run("compare", "a.npy", "r.npy")
    assert found == code
    assert word in out.splitlines()[0]


def test_run_writes_latent_and_video(project: Run, tmp_path: Path) -> None:
    code, out, _ = project("run", "three", "--set", "steps=2", "--output", "out")
    assert code == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
    assert "three: 2 steps in" in out


def test_run_takes_a_prompt_instead_of_a_case(run: Run, tmp_path: Path) -> None:
    code, _, err = run(
        "run", "builtin:digits", "--prompt", "a red one moving up", "--set", "steps=1"
    )
    assert code == 0, err
    assert len(list((tmp_path / "truestep-output").glob("digits-a-red-one-moving-up-*"))) == 2


def test_doctor(run: Run, tiny_wan: dict[str, Path], tmp_path: Path) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "attention.kernel           flash-cpu" in out
    assert out.splitlines()[0] == "nothing is missing"
    data: dict[str, Any] = json.loads(run("doctor", "--json")[1])
    assert data["library.torch"].startswith("2.")
    assert run("doctor", "--model", str(tiny_wan["wan22"]))[0] == 0
    index = json.loads((tiny_wan["wan21"] / "model_index.json").read_text())
    for name, code, told in (  # of a class that is run as it is, of one that there is not
        ("WanVideoToVideoPipeline", 0, "nothing is missing"),
        ("WanPipelin", 2, "has no class WanPipelin: pip install -U diffusers"),
    ):
        copy = shutil.copytree(tiny_wan["wan21"], tmp_path / name)
        (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        found = run("doctor", str(copy))
        assert (found[0], told in " ".join(found[1].split())) == (code, True)
    code, out, _ = run("doctor", "--model", str(tmp_path))
    assert code == 2
    assert "PROBLEM the model folder is not a diffusers model" in out


@pytest.mark.parametrize("damage", ["truncate", "flip", "pickle"])
def test_damaged_references_are_refused_not_trusted(
    damage: str, project: Run, tmp_path: Path
) -> None:
    (path,) = tmp_path.glob("truestep-references/*/*/*/*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-10]
    elif damage == "flip":
        data[-5] ^= 4
    else:
        data = bytearray(b"\x80\x04\x95garbage")
    path.write_bytes(data)
    code, _, err = project("check", "three")
    assert code == 2
    assert "FileFormatError" in err
    assert "hint:" in err
    code, _, err = project("check", "three", "--reference", str(path))
    assert code == 2


def test_one_broken_case_does_not_cost_the_others(project: Run, tmp_path: Path) -> None:
    project("record", "seven", "--floor", "none")
    (path,) = tmp_path.glob("truestep-references/*/*/*/*-a-red-three*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = project("check", "--json", "r.json")
    assert code == 2
    assert "BROKEN three: FileFormatError" in err
    assert "PASSED identical" in out
    assert len(json.loads((tmp_path / "r.json").read_text())["comparisons"]) == 1


def test_selftest_tells_which_gate_sees_what(project: Run) -> None:
    code, out, _ = project(
        "gate", "selftest", "three", "--gate", "allclose:1e-3", "--gate", "cosine"
    )
    assert code == 0
    assert out.startswith("PASSED three: damages caught: truestep 39 of 39 (100 %), allclose")
    asked = ("--gate", "allclose:1e-3", "--gate", "cosine", "-v")
    _, out, _ = project("gate", "selftest", "three", *asked)
    lines = out[out.index("\ndamage ") + 1 :].splitlines()
    assert lines[0].split() == [
        "damage",
        "truestep",
        "allclose:0.001",
        "cosine:0.005,0.01",
    ]
    assert lines[1].split() == ["judges", "both", "latent", "latent"]
    code, _, err = project("gate", "selftest", "three", "--gate", "ssim:2")
    assert code == 2
    assert "gate 'ssim:2' cannot judge anything" in err
    assert "hint: e.g. --gate ssim:0.93" in err
    assert project("gate", "selftest", "seven")[0] == 3


def test_selftest_judges_frames_and_writes_json(project: Run, tmp_path: Path) -> None:
    asked = [part for name in ("sglang", "psnr:28") for part in ("--gate", name)]
    code, out, _ = project("gate", "selftest", "three", *asked, "--json", "selftest.json")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    found = json.loads((tmp_path / "selftest.json").read_text())
    assert found["schema_version"] == 1
    (result,) = found["results"]
    assert result["tensors"] == ["latent/final", "step/0002/cond", "video/frames"]
    assert [s["domain"] for s in result["scores"]] == ["any", "frames", "frames"]
    assert not any(trial["lives"] for trial in result["scores"][0]["trials"])
    assert any(trial["lives"] for trial in result["scores"][1]["trials"])
    code, out, _ = project("gate", "selftest", "three", *asked, "--json")
    assert json.loads(out)["results"] == found["results"]


def test_selftest_needs_tensors(project: Run) -> None:
    assert project("record", "seven", "--level", "stats", "--floor", "none")[0] == 0
    code, _, err = project("gate", "selftest", "seven")
    assert code == 2
    assert "the reference holds no tensors to damage" in err
    assert "recorded at level stats; needed: full" in err
    assert "hint: truestep record seven --level full --update" in err


@pytest.mark.slow
def test_the_demo_tells_its_story(run: Run, tmp_path: Path) -> None:
    code, out, err = run("demo", "--output", "story")
    assert code == 0, out + err
    assert "truestep caught 3 of 3 port bugs and accepted 2 of 2 harmless changes" in out
    assert sorted(p.name for p in (tmp_path / "story").iterdir()) == [
        "clips.mp4",
        "reference.safetensors",
        "report.html",
    ]


def test_calibrate_adds_benign_runs_and_measures_false_alarms(project: Run, tmp_path: Path) -> None:
    (path,) = tmp_path.glob("truestep-references/*/*/*/*.safetensors")
    before = path.read_bytes()
    code, out, _ = project("record", "three", "--runs", "3")
    assert code == 0
    assert "\nCALIBRATED three: 3 benign runs added" in out
    said = " ".join(out.split())
    assert "false alarms 0 of 3 benign runs, each judged by the others: below 63.2% with" in said
    assert "bounds are made for 1 false alarm in 10,000 checks" in out
    (path,) = tmp_path.glob("truestep-references/*/*/*/*.safetensors")
    assert path.read_bytes() != before
    code, out, _ = project("check", "three")
    assert code == 0
    _, out, _ = project("show", str(path), "-v")
    assert re.search(
        r"\d+ runs \(attention, batch, functions, (instructions, )?jitter, mixed",
        " ".join(out.split()),
    )


def test_calibrate_refuses_a_model_that_is_not_the_reference(project: Run, tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(
        "def change(pipe):\n    pipe.transformer.proj_out.bias.data.add_(0.1)\n"
    )
    code, _, _ = project("record", "three", "--update", "--apply", "fault.py:change")
    assert code == 0
    code, _, err = project("record", "three", "--runs", "1")
    assert code == 2
    assert "the model does not give what its reference holds" in err
    assert "drifted: " in err

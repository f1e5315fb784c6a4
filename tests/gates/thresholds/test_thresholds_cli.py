"""`truestep gate thresholds` and `check --thresholds`, end to end on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.commands import Run, runner
from tests.gates.thresholds.samples import VACUOUS

CASES = """
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
"""


@pytest.fixture(scope="module")
def recorded(tiny_wan: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a case file and a reference of `three`."""
    from truestep import record
    from truestep.case import load_cases
    from truestep.recording.store import DEFAULT_ROOT, Store, place_of

    folder = tmp_path_factory.mktemp("project")
    (folder / "truestep.toml").write_text(CASES.format(model=tiny_wan["wan21"]))
    recording = record(load_cases(folder / "truestep.toml")["three"])
    Store(folder / DEFAULT_ROOT).save(recording, place_of(recording))
    return folder


@pytest.fixture
def run(
    recorded: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


def vacuous(path: str = "h100.json", case: str = "three") -> None:
    Path(path).write_text(json.dumps({"cases": {case: VACUOUS}}))


def test_write_then_lint_then_check(run: Run) -> None:
    code, out, err = run("gate", "thresholds", "write", "three", "--output", "new.json")
    assert (code, err) == (0, "")
    assert "WRITTEN three: limits from " in out
    assert "clip is not written: no CLIP weights here" in " ".join(out.split())
    code, out, _ = run("gate", "thresholds", "lint", "new.json", "--case", "three")
    assert code == 0, out
    assert "another seed, 10 % gain, 10 % noise" in out
    code, out, _ = run("check", "--thresholds", "new.json")
    assert code == 0
    assert "other gate   sglang new.json [three]: undecided" in out
    code, out, _ = run("check", "--thresholds", "new.json", "-v")
    assert code == 0
    out = " ".join(out.split())
    assert "other gate sglang new.json [three]: undecided (ssim 1, limit 0.9" in out
    assert "not judged clip (no CLIP weights here)" in out  # the reader's constant applies
    assert "PASSED identical" in out


def test_written_cases_are_kept_and_not_replaced_unasked(run: Run) -> None:
    vacuous(case="other")
    assert (
        run("gate", "thresholds", "write", "three", "--output", "h100.json", "--as", "mine")[0] == 0
    )
    data = json.loads(Path("h100.json").read_text())
    assert data["cases"]["other"] == VACUOUS
    code, _, err = run(
        "gate", "thresholds", "write", "three", "--output", "h100.json", "--as", "mine"
    )
    assert code == 2
    assert "the file has limits of case 'mine'" in err
    assert json.loads(Path("h100.json").read_text()) == data


def test_no_floor_no_limits(run: Run) -> None:
    run("record", "three", "--floor", "none", "--output", "bare.safetensors")
    code, _, err = run(
        "gate", "thresholds", "write", "three", "bare.safetensors", "--output", "new.json"
    )
    assert code == 2
    assert "hint: truestep record three --update" in err
    assert not Path("new.json").exists()


def test_the_gate_stands_beside_the_verdict(run: Run) -> None:
    vacuous()
    change = ("--set", "guidance_scale=8", "--json")
    code, out, _ = run("check", "--thresholds", "h100.json", *change)
    (comparison,) = json.loads(out)["comparisons"]
    assert (code, comparison["verdict"]) == (1, "drifted")
    (gate,) = comparison["gates"]
    assert gate["passed"] is None  # vacuous, and clip was not judged
    assert gate["not_judged"] == ["clip (no CLIP weights here)"]
    assert gate["thresholds"]["mad"] == 47.0
    Path("b200.json").write_text(json.dumps({"cases": {"three": {"psnr_threshold": 60}}}))
    code, out, _ = run("check", "--thresholds", "h100.json", "--platform", "b200", *change)
    (gate,) = json.loads(out)["comparisons"][0]["gates"]
    assert (gate["name"], gate["passed"]) == ("sglang h100.json + b200.json [three]", False)


def test_lint_tries_the_digits_model_where_there_is_no_reference(run: Run) -> None:
    vacuous(case="ltx_2_3_two_stage_ti2v_2gpus")
    code, out, _ = run("gate", "thresholds", "lint", "h100.json")
    assert code == 1
    assert "vacuous      ltx_2_3_two_stage_ti2v_2gpus: another seed passes: ssim 0.9" in out
    assert "tried on     builtin:digits, a stand-in" in out
    code, out, _ = run("gate", "thresholds", "lint", "h100.json", "--json")
    found = json.loads(out)
    assert (code, found["schema_version"]) == (1, 1)
    assert {f["kind"] for f in found["findings"]} == {"vacuous", "no provenance"}
    assert found["repeat"] == "truestep gate thresholds lint h100.json --json"


def test_findings_of_one_kind_are_one_line(run: Run) -> None:
    loose = {"ssim_threshold": 0.29, "psnr_threshold": 11.7, "mean_abs_diff_threshold": 47.0}
    cases = {f"case_{i}": loose for i in range(30)}
    Path("h100.json").write_text(json.dumps({"_comment": "x", "cases": cases}))
    code, out, _ = run("gate", "thresholds", "lint", "h100.json", "-v")
    assert code == 1
    text = " ".join(out.split())
    assert (
        "no provenance 30 cases: no runs, date, environment or commit: who measured these limits, "
        "and on what?: case_0, case_1, case_2, case_3 and 26 more" in text
    )
    assert "vacuous 30 cases: case_0: another seed passes: ssim 0.9" in text
    assert "likewise case_1, case_2, case_3 and 26 more" in text
    assert len([line for line in out.splitlines() if line.startswith("  vacuous")]) <= 6
    assert "30 vacuous, 30 no provenance" in text
    Path("b200.json").write_text('{"cases": {}}')
    code, out, _ = run("gate", "thresholds", "lint", "b200.json")
    assert (code, "tried" in out) == (0, False)


def test_unusable_files_and_options_are_refused(run: Run) -> None:
    Path("x.json").write_text("{}")
    code, _, err = run("gate", "thresholds", "lint", "x.json")
    assert code == 2
    assert "FileFormatError: the threshold file cannot be used" in err
    vacuous(case="thre")
    code, _, err = run("gate", "thresholds", "lint", "h100.json", "--case", "three")
    assert code == 2
    assert "did you mean 'thre'?" in err
    code, _, err = run("check", "--platform", "b200")
    assert code == 2
    assert "--platform needs --thresholds" in err
    code, _, err = run("check", "--thresholds", "absent.json")
    assert code == 2
    import numpy as np

    np.save("x.npy", np.zeros(3))
    vacuous()
    code, _, err = run("gate", "thresholds", "lint", "h100.json", "--reference", "x.npy")
    assert code == 2
    assert "there are no decoded frames to damage" in err

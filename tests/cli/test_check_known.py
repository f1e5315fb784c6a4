"""`truestep check --known`: a drift as stated passes, and the ledger cannot grow stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import Run, runner

CASES = """
[case.{name}]
model = "{model}"
prompt = "a red three moving left"
seed = {seed}
steps = 2
guidance_scale = 4.0
height = 16
width = 16
num_frames = 5
max_sequence_length = 8
settings = {{ device = "cpu" }}
"""
ENTRY = """
[known.{name}]
reason = "the port scales guidance by 1.1 (issue 41)"
since = 2024-10-01
stage = "{stage}"
rel_l2 = {size}
"""
CHANGE = ("check", "three", "--set", "guidance_scale=4.4")


@pytest.fixture(scope="module")
def recorded(tiny_wan: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a case file of two cases and a reference of the first."""
    from truestep import record
    from truestep.case import load_cases
    from truestep.recording.store import DEFAULT_ROOT, Store, place_of

    folder = tmp_path_factory.mktemp("project")
    cases = [
        CASES.format(name=name, model=tiny_wan["wan21"], seed=seed)
        for seed, name in enumerate(("three", "seven"))
    ]
    (folder / "truestep.toml").write_text("".join(cases))
    recording = record(load_cases(folder / "truestep.toml")["three"])
    Store(folder / DEFAULT_ROOT).save(recording, place_of(recording))
    return folder


@pytest.fixture
def run(recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(recorded)
    return runner(monkeypatch, capsys)


def ledger(name: str = "three", *, stage: str = "guidance", size: float) -> tuple[str, str]:
    Path("truestep-known.toml").write_text(ENTRY.format(name=name, stage=stage, size=size))
    return "--known", "truestep-known.toml"


def drift(run: Run) -> float:
    """How far the change really drifts."""
    _, out, _ = run(*CHANGE, "--json")
    rows = json.loads(out)["comparisons"][0]["rows"]
    drifted = [row for row in rows if row["verdict"] == "drifted"]
    assert {row["stage"] for row in drifted} == {"guidance"}
    return float(max(row["metrics"]["rel_l2"] for row in drifted))


def test_as_stated_it_passes_and_says_so(run: Run) -> None:
    size = drift(run)
    code, out, _ = run(*CHANGE, *ledger(size=size))
    assert code == 0
    assert out.startswith("KNOWN three: known failure at guidance since 2024-10-01: ")
    code, out, _ = run(*CHANGE, *ledger(size=size), "--json")
    found = json.loads(out)
    assert (code, found["exit_code"], found["verdict"]) == (0, 0, "drifted")
    assert found["comparisons"][0]["known"]["outcome"] == "known"


def test_worse_better_and_elsewhere_fail(run: Run) -> None:
    size = drift(run)
    code, out, _ = run(*CHANGE, *ledger(size=size / 3))
    assert (code, "worse than known at guidance" in " ".join(out.split())) == (1, True)
    code, out, _ = run(*CHANGE, *ledger(size=size * 3))
    assert (code, "tighten me" in out) == (1, True)
    code, out, _ = run(*CHANGE, *ledger(size=size, stage="decoding"))
    assert (code, "known is decoding only" in " ".join(out.split())) == (1, True)
    code, out, _ = run("check", "three", *ledger(size=size))
    assert (code, "delete the entry [known.three]" in " ".join(out.split())) == (1, True)


def test_an_entry_may_name_an_unchosen_case_but_no_stranger(run: Run) -> None:
    code, out, _ = run("check", "three", *ledger("seven", size=0.1))
    assert (code, "PASSED identical" in out) == (0, True)
    code, _, err = run("check", "three", *ledger("eight", size=0.1))
    assert code == 2
    assert "1 known failure of no case: 'eight'" in err

"""`--dry-run` of record and check, and what a recording of a large model begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.commands import Captured, Run, runner
from truestep.cli import dry_run
from truestep.engines import needs
from truestep.testing import tiny

WORDS = ("./flux", "--prompt", "a cat", "--set", "height=32", "--set", "width=32")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> Run:
    tiny.save("FluxPipeline", tmp_path / "flux")
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd)


def whole(out: str) -> list[str]:
    """What was printed, an entry a line."""
    return out.replace("\n  ", " ").splitlines()


def test_it_says_what_a_verb_would_take_and_computes_nothing(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("record", *WORDS, "--dry-run")
    assert code == 0
    lines = whole(out)
    assert lines[0].startswith("DRY RUN flux-a-cat-")
    assert lines[0].endswith(": nothing was computed")
    assert [line.split()[0] for line in lines[1:]] == [
        *("weights", "one", "generate", "record", "check")
    ]
    assert "most of them float32: text_encoder" in lines[1]
    assert "28 steps, 31 forwards" in lines[2]
    assert "on disk," in lines[4]
    assert lines[4].endswith("with --keep all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux"]
    assert run("check", *WORDS, "--dry-run")[1].replace("\n  ", " ").splitlines()[1:3] == lines[1:3]


def test_too_little_of_anything_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "free_memory", lambda: 1000)
    monkeypatch.setattr(needs, "free_disk", lambda path: 2000)
    code, out, _ = run("record", *WORDS, "--dry-run")
    assert code == 2
    problems = [line for line in whole(out) if line.startswith("PROBLEM")]
    assert problems[0].endswith("1 kB are free; --from-disk leaves weights in their files")
    assert problems[0].startswith("PROBLEM   record takes")
    assert problems[1].startswith("PROBLEM   the recording is of")
    assert problems[1].endswith("2 kB of disk are free")
    checked = next(x for x in whole(run("check", *WORDS, "--dry-run")[1]) if "PROBLEM" in x)
    assert checked.endswith("--from-disk leaves weights in their files")


def test_a_change_is_said_to_be_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "change.py").write_text("def raising(pipe): raise ValueError\n")
    for verb in ("record", "check"):
        _, out, _ = run(verb, *WORDS, "--dry-run", "--apply", "change.py:raising")
        assert out.splitlines()[-1] == (
            "note: all of it without --apply change.py:raising, which was not run"
        )
        assert "note" not in run(verb, *WORDS, "--dry-run")[1]


def test_what_is_written_is_what_was_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes more room than what checks read; a level without tensors next to none."""
    sizes: list[int] = []

    def free(path: Path) -> int:
        return sizes[0]

    monkeypatch.setattr(needs, "free_disk", free)
    estimate = needs.estimate

    def told(*args: Any, **kwargs: Any) -> needs.Estimate:
        found = estimate(*args, **kwargs)
        sizes[:] = [found.recording]
        return found

    monkeypatch.setattr(needs, "estimate", told)
    assert "PROBLEM" not in run("record", *WORDS, "--dry-run")[1]
    code, out, _ = run("record", *WORDS, "--dry-run", "--keep", "all")
    assert code == 2
    assert "PROBLEM   the recording is of" in out
    assert run("record", *WORDS, "--dry-run", "--keep", "all", "--level", "stats")[0] == 0


def test_a_free_run_to_be_judged_by_its_stages_keeps_every_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    estimate = needs.estimate

    def told(*args: Any, **kwargs: Any) -> needs.Estimate:
        found = estimate(*args, **kwargs)
        sizes[:] = [(found.recording, found.whole)]
        return found

    monkeypatch.setattr(needs, "estimate", told)
    monkeypatch.setattr(needs, "free_disk", lambda path: sizes[0][0])
    digits = ("record", "--prompt", "a red three", "--set", "steps=20", "--dry-run")
    assert run(*digits)[0] == 0
    code, out, _ = run(*digits, "--floor", "final")
    assert code == 2
    takes = dry_run.amount(sizes[0][1])
    assert f"PROBLEM   the recording is of {takes}" in out
    assert f", {takes} on disk" in out.replace("\n  ", " ")
    assert "--keep all" not in out
    assert run(*digits, "--floor", "final", "--keep", "1")[0] == 0
    assert run("record", *WORDS, "--dry-run", "--floor", "final")[0] == 0  # keeps no more


def test_a_large_model_is_not_recorded_where_there_is_no_room(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(needs, "free_disk", lambda path: 1000)
    monkeypatch.setattr(dry_run, "LARGE", 0)
    code, _, err = run("record", *WORDS)
    assert code == 2
    assert "there is no room for the recording" in err
    assert "1 kB are free" in err
    assert not list(tmp_path.glob("**/reference*"))


def test_kept_steps_are_said_and_chosen(run: Run, tmp_path: Path) -> None:
    words = (*WORDS, "--set", "num_inference_steps=9", "--floor", "none", "--update")
    _, out, _ = run("record", *words)
    assert "kept: what checks read, models at steps 0, 3, 4, 5, 8 of 9 (more: --keep all)" in out
    path = next(line for line in out.splitlines() if line.startswith("reference: "))
    _, shown, _ = run("show", path.partition(": ")[2])
    assert "  kept         what checks read, models at steps 0, 3, 4, 5, 8 of 9\n" in shown
    _, out, _ = run("record", *words, "--keep", "1,7")
    assert "models at steps 0, 1, 3, 4, 5, 7, 8 of 9" in out
    _, out, _ = run("record", *words, "--keep", "all")
    assert "RECORDED" in out
    assert "kept:" not in out
    assert "no step 9 in the reference" in run("record", *words, "--keep", "9")[2]
    assert "--keep needs numbers like 0,10,19" in run("record", *words, "--keep", "most")[2]
    digits = ("record", "--prompt", "a red three", "--set", "steps=9", "--floor", "none")
    code, out, _ = run(*digits, "--keep", "1")
    assert code == 0
    assert "kept: what checks read, models at steps 0, 1, 3, 4, 5, 8 of 9" in out
    path = next(line for line in out.splitlines() if line.startswith("reference: "))
    _, shown, _ = run("show", path.partition(": ")[2])
    assert "models at steps 0, 1, 3, 4, 5, 8 of 9\n" in shown
    assert "no step 9 in the reference" in run(*digits, "--keep", "9", "--update")[2]


@pytest.mark.parametrize(
    ("size", "text"),
    [(12, "12 bytes"), (4200, "4.2 kB"), (6.7e9, "6.7 GB"), (2.8e10, "28 GB"), (1.1e12, "1.1 TB")],
)
def test_amounts(size: float, text: str) -> None:
    assert dry_run.amount(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.24, "0.24 s"), (80, "80 s"), (120, "2 min"), (11_520, "3.2 h"), (260_000, "3 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert dry_run.duration(seconds) == text


def test_operations() -> None:
    assert [dry_run.operations(n) for n in (12, 3e6, 1.3e15)] == ["12", "3 mega", "1.3 peta"]

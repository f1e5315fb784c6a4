"""The bench of an accelerator on a CPU, tiny: its logic, its budget, what it says of itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.accelerator import faults, floors, memory, overhead, plans, running
from bench.accelerator.__main__ import main
from bench.accelerator.families import FAMILIES, FAULTY, FLUX, WAN
from bench.accelerator.place import Budget, Here
from bench.accelerator.running import SECTIONS, Section, run
from bench.accelerator.table import TABLES, markdown
from bench.bench_guidance import PLANS
from bench.bench_sizes import BARS
from bench.bench_sizes import build as build_sizes
from bench.common import paired, quiet

HERE = Here("cpu", real=False)
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _still() -> None:
    quiet()


class Clock:
    """Time that passes where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# --- time -----------------------------------------------------------------------------------------


def test_what_takes_longer_than_what_is_left_is_cut_and_said() -> None:
    clock = Clock()
    budget = Budget(10.0, clock)
    assert budget.allows("the first", "kind")
    with budget.spent("kind"):
        clock.now = 6.0
    assert not budget.allows("the second", "kind")
    assert budget.allows("something else")
    assert budget.cuts == ["the second"]


def test_the_first_of_a_kind_is_expected_to_take_what_is_said() -> None:
    budget = Budget(10.0, Clock())
    assert not budget.allows("long", "kind", expected=11.0)
    assert budget.allows("short", "kind", expected=9.0)


def test_a_part_cuts_for_the_whole() -> None:
    clock = Clock()
    whole = Budget(10.0, clock)
    half = whole.part(0.5)
    clock.now = 5.0
    assert not half.allows("of the half")
    assert whole.allows("of the whole")
    assert whole.cuts == ["of the half"]


def test_rounds_end_with_the_time_after_the_first_one() -> None:
    waits: list[int] = []
    samples = paired(
        {"a": lambda: None, "b": lambda: None},
        rounds=5,
        wait=lambda: waits.append(0),
        more=lambda: False,
    )
    assert [len(seconds) for seconds in samples.values()] == [1, 1]
    assert len(waits) == 1 + 2 * 2  # before, and after each of a warm-up round and a counted one


# --- sections -------------------------------------------------------------------------------------


def _good(here: Here, budget: Budget) -> Iterator[Row]:
    yield {
        "model": "wan",
        "dtype": "bfloat16",
        "work": "check",
        "times_plain": 2.0,
        "samples_s": [],
    }


def _raising(here: Here, budget: Budget) -> Iterator[Row]:
    yield from _good(here, budget)
    raise RuntimeError("out of luck\nand more")


def _partly(here: Here, budget: Budget) -> Iterator[Row]:
    yield from _good(here, budget)
    yield {"model": "flux", "dtype": "bfloat16", "failed": "ValueError: no"}


def test_a_section_that_raises_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    sections = {
        "overhead": Section(_raising, 1.0),
        "memory": Section(_partly, 1.0),
        "plans": Section(_good, 1.0),
    }
    report = run(HERE, tmp_path, seconds=60.0, sections=sections)
    found = report["sections"]
    assert [each["status"] for each in found.values()] == ["failed", "1 failed", "done"]
    assert found["overhead"]["error"] == "RuntimeError: out of luck"
    assert len(found["overhead"]["rows"]) == 1
    assert any("_raising" in line for line in found["overhead"]["traceback"])
    assert json.loads((tmp_path / "accelerator.json").read_text("utf-8")) == report
    text = (tmp_path / "accelerator.md").read_text("utf-8")
    assert "- FAILED: RuntimeError: out of luck\n" in text
    assert "- FAILED: flux, bfloat16: ValueError: no\n" in text
    assert "| wan bfloat16 | check | 2.00 | 0 |" in text


def test_where_a_device_answers_no_more_another_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def other(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        if len(asked) == 1:
            found = {"memory": {"status": "done", "rows": []}, "plans": {"status": "not asked for"}}
            path = Path(command[command.index("--output") + 1]) / "accelerator.json"
            path.write_text(json.dumps({"sections": found}), encoding="utf-8")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(running.subprocess, "run", other)
    monkeypatch.setattr(Here, "answers", lambda here: False)
    sections = {"plans": Section(_raising, 1.0), "memory": Section(_good, 1.0)}
    found = run(HERE, tmp_path / "a", seconds=60.0, sections=sections)["sections"]
    assert found["plans"]["status"] == "failed"
    assert found["memory"] == {"status": "done", "rows": [], "by": "another process"}
    assert asked[0][-2:] == ["--section", "memory"]
    found = run(HERE, tmp_path / "b", seconds=60.0, sections=sections)["sections"]
    assert found["memory"]["error"] == "another process ended with 1 and wrote nothing"


def test_a_device_that_is_there_answers() -> None:
    assert HERE.answers()


def test_a_section_without_time_is_cut_and_says_so(tmp_path: Path) -> None:
    clock = Clock()

    def slow(here: Here, budget: Budget) -> Iterator[Row]:
        clock.now = 100.0
        yield from _good(here, budget)

    sections = {"overhead": Section(slow, 1.0), "plans": Section(_good, 1.0)}
    report = run(HERE, tmp_path, seconds=10.0, sections=sections, clock=clock)
    assert report["sections"]["overhead"]["status"] == "done"
    assert report["sections"]["plans"]["status"] == "cut"
    assert report["sections"]["plans"]["rows"] == []
    assert report["sections"]["plans"]["cuts"] == ["all of it"]
    assert "there was no time for what is listed as cut" in (tmp_path / "accelerator.md").read_text(
        "utf-8"
    )


def test_results_are_there_after_each_section(tmp_path: Path) -> None:
    seen: list[str] = []

    def looking(here: Here, budget: Budget) -> Iterator[Row]:
        written = json.loads((tmp_path / "accelerator.json").read_text("utf-8"))
        seen.extend(each["status"] for each in written["sections"].values())
        yield from _good(here, budget)

    sections = {
        "plans": Section(_good, 1.0),
        "overhead": Section(looking, 1.0),
        "memory": Section(_good, 1.0),
    }
    run(HERE, tmp_path, seconds=60.0, names=["plans", "overhead"], sections=sections)
    assert seen == ["done", "not reached", "not asked for"]


def test_a_run_on_a_cpu_says_what_its_numbers_are_not(tmp_path: Path) -> None:
    report = run(HERE, tmp_path, seconds=60.0, sections={"plans": Section(_good, 1.0)})
    assert "of its logic, not of an accelerator" in markdown(report)
    here = report["environment"]
    for name in ("cudnn_deterministic", "deterministic", "matmul_allow_tf32", "cudnn_allow_tf32"):
        assert here[f"torch.{name}"] in ("True", "False")
    assert here["variable.CUBLAS_WORKSPACE_CONFIG"]
    report["scale"] = "real width"
    assert "Wan 2.1 1.3B" in markdown(report)
    assert "of its logic" not in markdown(report)


def test_every_section_has_a_table() -> None:
    assert set(SECTIONS) == set(TABLES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.accelerator", "--device", "cuda"])
    assert main() == 2
    assert "'cuda' cannot be used here" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["mps", "cuda0", "cpu:0"])
def test_other_devices_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.accelerator", "--device", device])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


# --- what they measure ----------------------------------------------------------------------------


def test_floors_of_every_kind_are_given_or_said_not_to_be_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floors, "FAMILIES", (WAN,))
    monkeypatch.setattr(floors, "DTYPES", ("bfloat16",))
    rows = list(floors.rows(HERE, Budget(60.0)))
    assert all(("rel_l2" in row) != ("not_here" in row) for row in rows), rows
    kinds = {row["kind"] for row in rows if row["by"] == "truestep"}
    assert kinds >= {"repeat", "precision", "attention", "functions", "batch", "jitter"}
    assert floors.ELSEWHERE in kinds
    own = {(row["kind"], row["detail"]): row for row in rows if row["by"] == "bench"}
    assert {name for kind, name in own if kind == "attention"} == {
        "math",
        "efficient",
        "flash",
        "cudnn",
    }
    assert own["attention", "math"]["kernel"] == "math"
    assert own["attention", "math"]["rel_l2"] > 0
    assert own["attention", "cudnn"]["not_here"].startswith("RuntimeError: No ")
    assert "CUDA" in own["TF32", "on"]["not_here"]
    assert own["allocation", "fresh memory"]["rel_l2"] < 0.05
    table = "\n".join(TABLES["floors"][1]({"rows": rows}))
    assert "- not here: TF32: on (wan bfloat16): TF32 is a format of CUDA's" in table


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (RuntimeError("No available kernel"), "not_here"),
        (ImportError("no compiler"), "not_here"),
        (torch.OutOfMemoryError("tried to allocate"), "failed"),
    ],
)
def test_what_is_not_here_is_not_what_failed(error: Exception, key: str) -> None:
    def raising(model: torch.nn.Module) -> Any:
        raise error

    change = floors.Change("attention", "cudnn", raising)
    row = floors._measured(change, torch.nn.Identity(), {}, torch.zeros(1), HERE)
    assert row[key] == f"{type(error).__name__}: {error}"


@pytest.mark.skipif(not floors.DEAD, reason="this torch has no name for it")
def test_an_error_of_a_kernel_is_no_reason_to_be_without_a_floor() -> None:
    def raising(model: torch.nn.Module) -> Any:
        raise floors.DEAD[0]("CUDA error: misaligned address")

    with pytest.raises(floors.DEAD, match="misaligned"):
        floors._measured(
            floors.Change("allocation", "x", raising), torch.nn.Identity(), {}, torch.zeros(1), HERE
        )


def test_what_is_compiled_is_cut_where_there_is_no_time_for_it() -> None:
    budget = Budget(floors.COMPILING_S - 1, Clock())
    assert list(floors.compiled_rows(HERE, budget)) == []
    count = len(FAMILIES) * len(floors.DTYPES)
    assert len(budget.cuts) == count
    assert budget.cuts[0] == "torch.compile of wan in bfloat16"


@pytest.mark.slow
def test_what_is_compiled_has_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "FAMILIES", (WAN,))
    monkeypatch.setattr(floors, "DTYPES", ("float32",))
    (row,) = floors.compiled_rows(HERE, Budget(300.0))
    assert ("rel_l2" in row) != ("not_here" in row)
    assert row.get("rel_l2", 0.0) < 1e-4


def test_weights_lie_where_they_lay_after_an_allocation() -> None:
    model = torch.nn.Linear(8, 8)
    before = {
        name: (weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()
    }
    with floors.displaced(model, 1):
        for name, weight in model.named_parameters():
            assert weight.data_ptr() % 64 == weight.itemsize
            assert torch.equal(weight, before[name][1])
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == before[name][0]


def test_a_planted_fault_is_found_and_a_twin_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "DTYPES", ("float16",))
    monkeypatch.setattr(faults, "FAULTY", (FLUX,))
    rows = list(faults.rows(HERE, Budget(60.0), count=1))
    assert [row["kind"] for row in rows] == ["fault", "twin"]
    number = faults.counts(rows)["float16"]
    assert number["found"] == number["faults"] == number["named"] == 1
    assert number["twins"] == 1
    assert number["missed"] == number["accused"] == 0
    assert rows[0]["module"].startswith("vae.decoder.")
    section = {"rows": rows, "counts": faults.counts(rows)}
    table = "\n".join(TABLES["faults"][1](section))
    assert "- float16: 1 of 1 faults found (0 of them inconclusive), 1 at the right place" in table
    assert f"module `{rows[0]['module']}`" in table


def _judged(**fields: Any) -> Row:
    plain = {"dtype": "float16", "entry": "x", "kind": "fault", "effect": 0.1, "place": ""}
    return {
        "model": "flux",
        **plain,
        "verdict": "drifted",
        "passed": False,
        "named": True,
        **fields,
    }


def test_misses_and_accusations_are_counted_and_what_has_no_effect_is_not() -> None:
    rows = [
        _judged(),
        _judged(verdict="inconclusive", named=False),
        _judged(verdict="equivalent", passed=True, named=None),
        _judged(effect=0.0, verdict="identical", passed=True),
        _judged(kind="twin", effect=None, verdict="drifted"),
        _judged(kind="twin", effect=None, verdict="equivalent", passed=True),
        {"model": "flux", "dtype": "float16", "entry": "y", "kind": "twin", "failed": "no"},
        {"model": "flux", "dtype": "float16", "entry": "z", "kind": "twin", "not_applicable": "?"},
    ]
    assert faults.counts(rows)["float16"] == {
        "faults": 3,
        "found": 2,
        "found_undecided": 1,
        "missed": 1,
        "named": 1,
        "twins": 2,
        "accused": 1,
        "accused_undecided": 0,
    }
    table = "\n".join(TABLES["faults"][1]({"rows": rows, "counts": faults.counts(rows)}))
    assert "MISSED" in table
    assert "ACCUSED" in table
    assert "no effect here, not counted" in table


def test_entries_that_there_is_no_time_for_are_said_to_be_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    budget = Budget(10.0, clock)

    def late(entry: Any, trusted: Any) -> Row:
        clock.now += 6.0
        return _judged(kind=entry.kind)

    monkeypatch.setattr(faults, "planted", late)
    entries = faults._in_turn(FLUX, 0)[:4]
    rows = list(faults._planted(entries, None, 2, budget, of="flux"))  # type: ignore[arg-type]
    assert [row["kind"] for row in rows] == ["fault", "twin"]
    assert budget.cuts == [f"{entry.kind} {entry.name} of flux" for entry in entries[2:]]


def test_entries_that_there_are_not_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "planted", lambda entry, trusted: _judged(kind=entry.kind))
    budget = Budget(10.0, Clock())
    entries = faults._in_turn(FLUX, 0)[:2]
    rows = list(faults._planted(entries, None, 2, budget, of="flux"))  # type: ignore[arg-type]
    assert len(rows) == 2
    assert budget.cuts == [
        f"1 more {kind}s of flux: the corpus has none" for kind in ("fault", "twin")
    ]


def test_families_share_the_faults_and_have_enough() -> None:
    quotas = [len(range(at, faults.COUNT, len(FAULTY))) for at in range(len(FAULTY))]
    assert sum(quotas) == faults.COUNT
    for family, quota in zip(FAULTY, quotas, strict=True):
        for kind in ("fault", "twin"):
            assert sum(entry.kind == kind for entry in faults._in_turn(family, 0)) >= quota


def test_plans_are_timed_in_pairs_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "ROUNDS", 2)
    rows = {row["plan"]: row for row in plans.rows(HERE, Budget(60.0))}
    assert list(rows) == list(PLANS)
    for row in rows.values():
        assert len(row["samples_s"]) == len(row["stock_s"]) == 2
        assert row["verdict"] in ("identical", "equivalent")
    assert rows["off (A/A)"]["same_bits"]
    assert rows["batched"]["batched_steps"] > 0


def test_plans_without_time_are_not_checked_and_say_so() -> None:
    clock = Clock()
    budget = Budget(1.0, clock)
    clock.now = 2.0
    assert plans._verdicts(None, {}, budget) == {}
    assert budget.cuts == ["verdicts of truestep's check on every plan"]


def test_overhead_is_a_ratio_to_a_plain_generation() -> None:
    part = Budget(1.0)
    rows = list(overhead._of(WAN, HERE, part))
    assert {row["work"] for row in rows} == {"record, no noise floor", "check", *overhead.TRACES}
    assert all(row["times_plain"] > 0 for row in rows)
    assert all(len(row["samples_s"]) == len(row["plain_s"]) == 1 for row in rows)
    assert f"{overhead.ROUNDS - 1} of {overhead.ROUNDS} rounds of plain, record" in part.cuts[0]
    assert part.cuts[1:] == ["timing a noise floor of wan"]


@pytest.mark.bar
def test_overhead_of_every_family_holds_a_noise_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "FLOOR_ROUNDS", 1)
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    budget = Budget(300.0)
    rows = list(overhead.rows(HERE, budget))
    assert not budget.cuts
    assert not [row for row in rows if "failed" in row]
    works = [row["model"] for row in rows if row["work"] == "record with a noise floor"]
    assert works == ["wan", "flux"]


def test_memory_is_a_ratio_to_a_plain_run(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"plain": 500, "record": 600, "check": 550, "modules": 700}

    def asked(*args: Any, **_: Any) -> Row:
        return {"mb": peaks[args[3]], "verdict": "drifted", "at": "blocks.0.attn1.to_q"}

    monkeypatch.setattr(memory, "asked", asked)
    rows = {row["work"]: row for row in memory.rows(HERE, Budget(60.0))}
    assert set(rows) == {"plain", *BARS}
    assert rows["modules"]["times_plain"] == 1.4
    assert "times_plain" not in rows["plain"]
    table = "\n".join(TABLES["memory"][1]({"rows": list(rows.values())}))
    assert "| wan bfloat16 | modules | 700 | 1.40 | drifted at blocks.0.attn1.to_q |" in table


@pytest.mark.slow
def test_peaks_of_a_device_are_of_each_kind_of_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is done on CUDA, done here with an allocator that only counts."""
    peaks = iter((100e6, 120e6, 110e6, 140e6))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    model = tmp_path / "model"
    build_sizes(model, memory.DTYPE, **memory.TINY)
    peak = memory._on_device(model, HERE)
    found = {what: peak(what) for what in ("plain", *BARS)}
    assert [row["peak_mb"] for row in found.values()] == [90.0, 110.0, 100.0, 130.0]
    assert all(row["held_mb"] == 10 for row in found.values())
    assert found["check"]["verdict"] == "identical"
    assert found["modules"]["verdict"] == "drifted"
    assert found["modules"]["at"].endswith("attn1.to_q")


@pytest.mark.bar
def test_memory_of_processes_is_measured() -> None:
    rows = {row["work"]: row for row in memory.rows(HERE, Budget(300.0))}
    assert set(rows) == {"plain", *BARS}
    assert rows["check"]["verdict"] == "identical"
    assert rows["modules"]["verdict"] == "drifted"
    assert rows["modules"]["at"].endswith("attn1.to_q")


def test_widths_are_of_the_classes_that_they_are_for() -> None:
    import inspect

    for family in (*FAMILIES, *FAULTY):
        kind = type(family.subject.build(0).transformer)
        assert set(family.width) <= set(inspect.signature(kind.__init__).parameters)

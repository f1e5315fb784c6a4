"""`truestep perf`, end to end: measured on a tiny model, judged on planted runs."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from tests.commands import Run, flat, runner
from tests.experiment.test_baseline import COHORT, SCHEMAS, make_run
from truestep.cli import perf
from truestep.experiment.baseline import STAGES, check_result
from truestep.experiment.history import open_history
from truestep.experiment.perf_importing import PerfImport
from truestep.experiment.perf_records import Cohort, PerfBatch, PerfResults, PerfRun
from truestep.report.perf import print_results
from truestep.report.trend import Trend
from truestep.verdict import Verdict

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
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in a folder with a case file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truestep.toml").write_text(FILE.format(model="builtin:digits"))

    return runner(monkeypatch, capsys, "perf")


class Planted:
    """What stands for a model: runs of a speed that a test sets."""

    def __init__(self) -> None:
        self.speed, self.cohort, self.seed = 1.0, COHORT, 0
        self.change: Callable[[PerfRun], PerfRun] = lambda run: run

    def session(self, *_: object) -> object:
        self.seed += 1
        return SimpleNamespace(cohort=self.cohort)

    def measured(self, _: object, __: str, runs: int) -> Iterator[PerfRun]:
        rng = random.Random(self.seed)
        for _number in range(runs):
            yield self.change(make_run(self.speed * math.exp(rng.gauss(0, 0.01))))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Planted runs in place of measured ones."""
    made = Planted()
    monkeypatch.setattr(perf, "_session", made.session)
    monkeypatch.setattr(perf, "_measured", made.measured)
    return made


def baseline(run: Run, *, batches: int = 6, runs: int = 20) -> None:
    for _ in range(batches):
        assert run("record", "three", "--runs", str(runs))[0] == 0


def test_measured_on_a_real_model(run: Run, tiny_wan: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "truestep.toml").write_text(FILE.format(model=tiny_wan["wan21"]))
    code, out, _ = run("record", "three", "--runs", "2", "--json", "r.json", "--label", "abc")
    assert code == 0
    assert out.startswith("RECORDED three: 2 runs, median ")
    (result,) = PerfResults.model_validate_json((tmp_path / "r.json").read_text()).results
    assert result.cohort is not None
    wanted = {"device.name", "machine.cores", "torch.threads", "library.torch", "case.dtype"}
    assert wanted | {"attention.kernel"} <= set(result.cohort.values)
    for found in result.runs:
        assert set(found.stages_ms) == set(STAGES)
        assert list(found.denoise_step_ms) == ["0", "1", "2", "3"]
        assert found.memory_mib
        assert found.load_ms
    code, out, _ = run("check", "three", "--runs", "2")
    assert code in (1, 4)  # two runs are too few for anything but a drift
    assert re.search(r"^  e2e ms +\d", out, re.MULTILINE)
    code, out, _ = run("show", "three")
    assert code == 0
    assert "abc" in out
    assert out.startswith("2 runs in 1 batch of 1 case and 1 cohort\n")


def test_the_same_speed_passes(run: Run, planted: Planted) -> None:
    baseline(run)
    code, out, _ = run("check", "three", "--runs", "20")
    assert code == 0
    assert out.startswith("PASSED equivalent: three: as fast as its baseline")
    assert out.splitlines()[-1] == "repeat: truestep perf check three --runs 20"
    code, out, _ = run("check", "three", "--runs", "20", "-v")
    assert code == 0
    assert f"cohort       {COHORT.id}" in out
    assert "slower would not have passed" in out
    assert "baseline     120 runs of 6 processes in truestep-references/perf.sqlite" in out
    assert out.splitlines()[-1] == "repeat: truestep perf check three --runs 20 -v"


def test_a_slow_down_of_three_percent_fails(run: Run, planted: Planted, tmp_path: Path) -> None:
    baseline(run, batches=8)
    planted.speed = 1.03
    code, out, _ = run("check", "three", "--runs", "20", "--json", "c.json")
    assert code == 1
    assert out.startswith("FAILED drifted: three: slower: e2e ")
    results = PerfResults.model_validate_json((tmp_path / "c.json").read_text())
    assert (results.verdict, results.exit_code) == (Verdict.DRIFTED, 1)
    assert len(results.results[0].runs) == 20


def test_an_improvement_becomes_the_baseline_by_recording_it(run: Run, planted: Planted) -> None:
    baseline(run, batches=8)
    planted.speed = 0.9
    code, out, _ = run("check", "three", "--runs", "20")
    assert code == 0
    assert "next: truestep perf record three  # faster: makes it the new baseline\n" in out
    code, out, _ = run("record", "three", "--runs", "20")
    assert code == 0
    assert "the new baseline: faster (-" in flat(out)
    with open_history("truestep-references/perf.sqlite") as history:
        assert [b.baseline for b in history.batches(COHORT)] == [1] * 8 + [2]


def test_recording_a_slow_down_does_not_hide_it(run: Run, planted: Planted) -> None:
    baseline(run)
    planted.speed = 1.5
    code, out, _ = run("record", "three", "--runs", "20")
    assert code == 0
    assert "not counted: it has drifted (+5" in flat(out)
    assert run("check", "three", "--runs", "20")[0] == 1
    code, out, _ = run("record", "three", "--runs", "20", "--fresh")
    assert "the new baseline (+5" in flat(out)
    assert run("check", "three", "--runs", "3")[0] in (0, 4)
    assert "not counted" in run("show")[1]


def test_too_few_runs_are_inconclusive(run: Run, planted: Planted) -> None:
    baseline(run, batches=1, runs=3)
    code, out, _ = run("check", "three", "--runs", "3")
    assert code == 4
    hint = re.search(r"next: truestep perf (record three --runs \d+)  # \d+ more recorded", out)
    assert hint, out
    assert run(*hint[1].split())[0] == 0


def test_a_case_said_on_the_command_line_is_named_as_it_was(run: Run, planted: Planted) -> None:
    said = ("--prompt", "a red one", "--runs", "3")
    steps = {str(at): 4 * 179 / 25 for at in range(25)}
    planted.change = lambda run: run.model_copy(update={"denoise_step_ms": steps})
    code, out, err = run("record", *said)
    assert code == 0, (out, err)
    code, out, _ = run("check", *said)
    assert code == 4
    hint = re.search(r"next: truestep perf (record --prompt 'a red one' --runs \d+)  # ", out)
    assert hint, out
    assert run(*shlex.split(hint[1]))[0] == 0


def test_a_wide_interval_stands_beside_a_large_change(capsys: pytest.CaptureFixture[str]) -> None:
    """What passes although it is much slower says why on the default screen."""
    speeds = (0.7, 0.9, 1.0, 1.1, 1.3)
    wild = [
        PerfBatch(id=at, baseline=1, runs=(make_run(speed),) * 10)
        for at, speed in enumerate(speeds)
    ]
    for speed, told in ((1.2, r"as expected: [\d.,]+ to [\d.,]+"), (1.0, "equivalent")):
        result = check_result(
            [make_run(speed)] * 10, wild, cohort=COHORT, case_name="three", steps=4
        )
        assert result.verdict is Verdict.EQUIVALENT
        print_results(PerfResults.of([result], repeat="truestep perf check three"))
        out = capsys.readouterr().out
        assert re.search(rf"^  decode ms .*%  {told}$", out, re.MULTILINE), out


def test_another_cohort_is_missing(run: Run, planted: Planted) -> None:
    code, out, _ = run("check", "three")
    assert code == 3
    assert "no baseline of this cohort; there is no history" in out
    baseline(run, batches=1)
    planted.cohort = Cohort(
        case_id=COHORT.case_id, values={**COHORT.values, "torch.threads": "8", "library.torch": "3"}
    )
    code, out, _ = run("check", "three")
    assert code == 3
    assert f"truestep {COHORT.id}, 20 runs: library.torch 3 (there (absent)), " in flat(out)
    assert "torch.threads 8 (there 1)" in flat(out)
    assert "next: truestep perf record three" in out


def test_impossible_runs_are_invalid_and_not_kept(run: Run, planted: Planted) -> None:
    baseline(run, batches=1)
    planted.change = lambda found: found.model_copy(update={"e2e_ms": 0.0})
    code, out, _ = run("check", "three")
    assert code == 1
    assert out.startswith("FAILED invalid: three: run 0: e2e_ms is 0")
    code, out, _ = run("record", "three")
    assert code == 1
    assert "it was not kept" in flat(out)
    with open_history("truestep-references/perf.sqlite") as history:
        assert len(history.batches(COHORT)) == 1


def test_json_alone_on_stdout(run: Run, planted: Planted) -> None:
    code, out, _ = run("record", "three", "--json")
    assert code == 0
    assert PerfResults.model_validate_json(out).results[0].action == "record"


def test_a_case_that_raises(
    run: Run, tiny_wan: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truestep.experiment import perf_measuring

    (tmp_path / "truestep.toml").write_text(FILE.format(model=tiny_wan["wan21"]))
    generate, calls = perf_measuring.generate, []

    def third_raises(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of patience")
        return generate(*arguments, **options)

    monkeypatch.setattr(perf_measuring, "generate", third_raises)
    code, _, err = run("record", "three", "--runs", "4")
    assert code == 2
    assert err.startswith("TruestepError: the case raised RuntimeError: out of patience")
    assert "three, generating" in err
    assert "Traceback" not in err
    with open_history("truestep-references/perf.sqlite") as history:
        ((cohort, counting),) = history.cohorts()
        (batch,) = history.batches(cohort)
    assert (len(batch.runs), batch.complete, counting) == (1, False, 0)


def test_one_broken_case_does_not_cost_the_others(
    run: Run, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truestep.errors import TruestepError

    text = Path("truestep.toml").read_text()
    Path("truestep.toml").write_text(text + text.replace("case.three", "case.four"))

    def breaks(name: str, *_: object) -> object:
        if name == "three":
            raise TruestepError("the case raised ValueError: no")
        return planted.session()

    monkeypatch.setattr(perf, "_session", breaks)
    code, out, err = run("record")
    assert code == 2
    assert err.startswith("BROKEN three: TruestepError: the case raised ValueError: no")
    assert "RECORDED four: 10 runs" in out


@pytest.mark.parametrize("runs", ["0", "-1"])
@pytest.mark.parametrize("verb", ["record", "check"])
def test_runs_below_one(run: Run, verb: str, runs: str) -> None:
    code, _, err = run(verb, "three", "--runs", runs)
    assert code == 2
    assert f"{runs} is not in the range x>=1" in err


def test_a_history_that_is_something_else_is_told_before_a_model_is_loaded(
    run: Run, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(perf, "_session", loads)
    Path("other.sqlite").write_text("hello, I am a text file, " * 80)
    for arguments in (("record", "three"), ("check", "three"), ("show",)):
        code, _, err = run(*arguments, "--history", "other.sqlite")
        assert code == 2
        assert "this is not a history: it is not a SQLite file" in err


def test_where_there_is_nothing_to_show_the_hint_works_as_typed(
    run: Run, planted: Planted, tmp_path: Path
) -> None:
    steps = {str(at): 4 * 179 / 25 for at in range(25)}
    prompt = "--prompt 'a red three moving left'"
    shown = {
        ("show", "nine"): f"truestep perf record {prompt}  # a case without a file",
        ("show", "--history", "my runs"): "truestep perf record --history 'my runs'  # makes one",
        ("show", "three"): "truestep perf record three  # makes one",
        ("show",): "truestep perf record  # makes one",
    }
    for words, told in shown.items():
        code, _, err = run(*words)
        assert (code, err.splitlines()[-1]) == (2, f"hint: {told}")
        of_digits = "--prompt" in told
        planted.change = lambda run: (
            run.model_copy(update={"denoise_step_ms": steps}) if of_digits else run  # noqa: B023
        )
        typed = shlex.split(told.removeprefix("truestep perf "), comments=True)
        assert run(*typed, "--runs", "1")[0] == 0
        if "my runs" not in told:
            (tmp_path / "truestep-references" / "perf.sqlite").unlink()
    baseline(run, batches=1)
    code, _, err = run("show", "nine")
    assert (code, err.splitlines()[-1]) == (
        3,
        "hint: truestep perf show  # shows all that there are",
    )
    assert run("show")[0] == 0
    (tmp_path / "truestep.toml").unlink()
    code, _, err = run("record", "nine", "--runs", "1")
    hint = f"truestep perf record --runs 1 {prompt}  # a case without a file"
    assert (code, err.splitlines()[-1]) == (2, f"hint: {hint}")
    planted.change = lambda run: run.model_copy(update={"denoise_step_ms": steps})
    assert run(*shlex.split(hint.removeprefix("truestep perf "), comments=True))[0] == 0


def test_nothing_to_show(run: Run, planted: Planted) -> None:
    code, _, err = run("show")
    assert (code, "there is no history" in err) == (2, True)
    baseline(run, batches=1)
    code, _, err = run("show", "nine")
    assert code == 3
    assert "the history holds no runs of 'nine'" in err
    assert f"it holds: {COHORT.case_id}" in err


def test_the_page_is_self_contained_and_escaped(run: Run, planted: Planted) -> None:
    run("record", "three", "--label", "<script>alert(1)</script>")
    planted.cohort = Cohort(case_id=COHORT.case_id, values={**COHORT.values, "library.torch": "3"})
    run("record", "three", "--label", "new torch")
    code, out, _ = run("show", "--report", "trend.html", "--json", "trend.json")
    assert code == 0
    assert out.splitlines()[-1] == "report: trend.html"
    assert "-- cohort: library.torch (absent) -> 3" in out
    page = Path("trend.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count('<svg viewBox="0 0') == 4  # whole, denoise, decode, memory
    assert page.count('class="change"') == 4
    schema = json.loads((SCHEMAS / "perf-trend-1.json").read_text("utf-8"))
    jsonschema.validate(json.loads(Path("trend.json").read_text()), schema)
    trend = Trend.model_validate_json(Path("trend.json").read_text())
    assert [b.label for b in trend.cases[0].batches][1] == "new torch"


SGLANG: dict[str, Any] = {
    "metadata": {"model": "Diffusion Server", "hardware": "H100", "last_updated": "2026-08-16"},
    "tolerances": {"pr_test": {"e2e": 0.25}},
    "scenarios": {
        "wan_t2v": {
            "notes": "two steps",
            "stages_ms": {
                "TextEncodingStage": 232.03,
                "DenoisingStage": 500.0,
                "ImageVAEEncodingStage": 0.0,
                "per_frame_generation": None,
            },
            "denoise_step_ms": {"0": 240.0, "1": 255.0},
            "expected_e2e_ms": 800.0,
            "expected_avg_denoise_ms": 247.5,
            "expected_median_denoise_ms": 247.5,
            "runtime_peak_vram_mb": 46938.0,
        },
        "action_http": {
            "stages_ms": {},
            "denoise_step_ms": {},
            "expected_e2e_ms": 21.37,
            "expected_avg_denoise_ms": 0.0,
            "expected_median_denoise_ms": 0.0,
        },
    },
}

FASTVIDEO: dict[str, Any] = {
    "model_id": "Wan2.1-T2V-1.3B-Diffusers",
    "device": "NVIDIA L40S",
    "num_gpus": 2,
    "avg_generation_time_s": 31.0,
    "individual_times_s": [30.0, 31.0, 32.0],
    "max_peak_memory_mb": 10100.0,
    "individual_peak_memories_mb": [10000.0, 10100.0, 10050.0],
    "dit_time_s": 8.2,
    "timestamp": "2026-07-05T00:00:00+00:00",
}


def write(name: str, content: object) -> str:
    Path(name).write_text(json.dumps(content))
    return name


def test_both_tools_are_imported_as_cohorts_of_their_own(run: Run) -> None:
    names = (write("perf_baselines.json", SGLANG), write("fastvideo.json", FASTVIDEO))
    code, out, _ = run("import", *names, "-v")
    assert code == 0
    assert "perf_baselines.json: sglang, 2 cases" in out
    assert "a stage of 0, below the file's resolution of 0.01 ms, is left out: wan_t2v" in out
    assert "imported 3 batches of 2 files" in out
    with open_history("truestep-references/perf.sqlite") as history:
        cohorts = {cohort.case_id: cohort for cohort, _ in history.cohorts()}
        wan = history.baseline(cohorts["wan_t2v"])[0].runs[0]
        fast = history.baseline(cohorts["Wan2.1-T2V-1.3B-Diffusers"])[0].runs
    assert cohorts["wan_t2v"].source == "sglang"
    assert cohorts["wan_t2v"].values["hardware"] == "H100"
    assert wan.stages_ms == {"TextEncodingStage": 232.03, "DenoisingStage": 500.0}
    assert (wan.e2e_ms, wan.memory_mib, wan.memory_kind) == (800.0, 46938.0, "device")
    assert wan.denoise_step_ms == {"0": 240.0, "1": 255.0}
    assert [found.e2e_ms for found in fast] == [30000.0, 31000.0, 32000.0]
    assert cohorts["Wan2.1-T2V-1.3B-Diffusers"].values == {"device": "NVIDIA L40S", "num_gpus": "2"}
    code, out, _ = run("import", *names)
    assert (code, "imported 0 batches of 2 files; 3 were there already" in out) == (0, True)
    code, out, _ = run("show", "wan_t2v", "--report", "t.html")
    assert (code, "2026-08-16" in out) == (0, True)


STEPS = {"denoise_step_ms": {"0": 300.0, "1": 310.0, "2": 330.0}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"expected_e2e_ms": -3.0}, "e2e_ms is -3"),
        ({"expected_e2e_ms": 0.0}, "e2e_ms is 0"),
        ({"expected_e2e_ms": math.nan}, "e2e_ms is nan"),
        ({"stages_ms": {"DenoisingStage": -1.0}}, "stages_ms DenoisingStage is -1"),
        ({"denoise_step_ms": {"0": 0.0}}, "denoise_step_ms 0 is 0"),
        ({"expected_median_denoise_ms": -1.0}, "expected_median_denoise_ms is -1"),
        (
            {**STEPS, "expected_median_denoise_ms": 340.0},
            "expected_median_denoise_ms is 340, outside its own samples: 300 to 330",
        ),
        (
            {**STEPS, "expected_avg_denoise_ms": 200.0},
            "expected_avg_denoise_ms is 200, outside its own samples: 300 to 330",
        ),
    ],
)
def test_impossible_scenarios_are_left_out_and_named(
    run: Run, changes: dict[str, Any], why: str
) -> None:
    content = json.loads(json.dumps(SGLANG))
    content["scenarios"]["broken"] = {"expected_e2e_ms": 900.0, **changes}
    code, out, _ = run("import", write("b.json", content), "--json")
    assert code == 1
    result = PerfImport.model_validate_json(out)
    assert result.verdict is Verdict.INVALID
    assert result.files[0].left_out == {"broken": why}
    assert result.new == 2
    assert result.sentence.endswith("1 left out: their numbers cannot be true")


def test_parts_that_do_not_add_up_are_imported_and_counted_in_one_note(run: Run) -> None:
    """Work around the loop, offload, pipelines of two stages: as SGLang's real files have it."""
    content = json.loads(json.dumps(SGLANG))
    for number in range(30):
        content["scenarios"][f"offload_{number}"] = {
            "expected_e2e_ms": 1500.0,
            "stages_ms": {"DenoisingStage": 1200.0},
            **STEPS,
            "expected_median_denoise_ms": 310.0,
        }
        content["scenarios"][f"two_stages_{number}"] = {
            "expected_e2e_ms": 900.0,
            "stages_ms": {"LTX2AVDenoisingStage": 600.0, "UpsamplingStage": 350.0},
            **STEPS,
        }
    sampled = {"denoise_step_ms": {"0": 3281.0, "2": 209.0}, "expected_median_denoise_ms": 205.0}
    content["scenarios"]["sampled"] = {"expected_e2e_ms": 12161.0, **sampled}
    code, out, _ = run("import", write("b.json", content), "-v")
    assert code == 0
    assert "b.json: sglang, 63 cases" in out
    notes = [line for line in out.splitlines() if line.startswith("  note")]
    assert notes[1].startswith(
        "  note         60 cases: the steps do not sum to their stage (work around the loop, "
        "offload, two stages): offload_0 (the steps sum to 940 ms, stages_ms DenoisingStage says "
        "1200), two_stages_0 "
    )
    assert notes[1].endswith(" and 57 more")
    assert notes[2].startswith("  note         30 cases: the stages sum to more than the whole")
    assert len(notes) == 3


def test_a_mean_outside_its_own_runs_is_left_out(run: Run) -> None:
    code, out, _ = run(
        "import", write("f.json", {**FASTVIDEO, "avg_generation_time_s": 33.0}), "-v"
    )
    assert code == 1
    assert "avg_generation_time_s is 33, outside its own samples: 30 to 32" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON that can be read"),
        ("[]", "neither SGLang's perf_baselines.json nor a FastVideo"),
        ('{"scenarios": {}}', "scenarios holds no scenario"),
        ('{"scenarios": {"a": 3}}', "malformed: a is not a table"),
        ('{"scenarios": {"a": {}}}', "scenarios.a.expected_e2e_ms is missing"),
        ('{"scenarios": {"a": {"expected_e2e_ms": "fast"}}}', "is not a number: 'fast'"),
        ('{"scenarios": {"a": {"expected_e2e_ms": 1, "stages_ms": [1]}}}', "a.stages_ms is not a"),
        (
            '{"scenarios": {"a": {"expected_e2e_ms": 1, "denoise_step_ms": {"x": 1}}}}',
            "has a key that is not a step's index",
        ),
        ('{"avg_generation_time_s": 3}', "has neither benchmark_id nor model_id"),
        ('{"slice_spec": {}, "metrics": {}}', "it is the result of FastVideo's latent gate"),
    ],
)
def test_a_malformed_file_imports_nothing(run: Run, content: str, words: str) -> None:
    Path("bad.json").write_text(content)
    code, _, err = run("import", write("good.json", SGLANG), "bad.json")
    assert code == 2
    assert words in err
    assert "hint: nothing was imported" in err
    assert not Path("truestep-references").exists()


def test_an_absent_file(run: Run) -> None:
    code, _, err = run("import", "nowhere.json")
    assert code == 2
    assert "nowhere.json" in err


def test_help_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys\nfrom truestep.cli.app import app\n"
        "app(['perf', 'check', '-h'], standalone_mode=False)\n"
        "import truestep.experiment.history, truestep.report.trend\n"
        "assert not {'torch', 'diffusers', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

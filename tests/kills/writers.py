"""Everything in truestep that writes a file, each as a writer of numbers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from datetime import date
from functools import cache
from pathlib import Path

import pytest
import torch

import truestep
from tests.experiment.test_baseline import COHORT, make_run
from tests.experiment.test_experiment_store import CELL, PLAN, sample
from tests.kills.harness import Writer
from tests.kills.stores import STORES
from tests.recording.test_store import CASE, find, recording
from truestep import files
from truestep.errors import FileFormatError
from truestep.experiment import store as experiments
from truestep.experiment.history import open_history
from truestep.experiment.records import Sample
from truestep.floors import NoiseFloor, NoiseRun
from truestep.gates.thresholds import file as thresholds
from truestep.parity.evidence import Evidence
from truestep.parity.ledger import Component, read_ledger, update_ledger
from truestep.recording.format import Recording
from truestep.recording.partial import Partial
from truestep.recording.recovery import recover, spools
from truestep.recording.store import Store, candidate_of, place_of
from truestep.report import html
from truestep.standalone.recorder import _Store as Recorder
from truestep.verdict import Comparison, Results


def _one(values: torch.Tensor) -> set[int]:
    """The number that a whole tensor is filled with."""
    if not (values == values.flatten()[0]).all():
        raise ValueError("half of one, half of another")
    return {int(values.flatten()[0])}


# --- recordings, references ------------------------------------------------------------------


def _write_recording(folder: Path, value: int) -> None:
    recording(float(value)).save(folder / "r.safetensors")


def _read_recording(folder: Path) -> set[int]:
    return _one(Recording.open(folder / "r.safetensors")["x"])


def _write_reference(folder: Path, value: int) -> None:
    own = recording(float(value))
    Store(folder).save(own, place_of(own), update=True)


def _read_reference(folder: Path) -> set[int]:
    return _one(Recording.open(find(Store(folder)))["x"])


def _write_references(folder: Path, value: int) -> None:
    own = recording(float(value), CASE.replace(seed=value))
    Store(folder).save(own, place_of(own), update=True)


def _read_references(folder: Path) -> set[int]:
    store = Store(folder)
    found: set[int] = set()
    for place in store.places():
        found |= _one(Recording.open(store.verified(place))["x"])
    return found


def _write_measured(folder: Path, value: int, *, resume: bool = False) -> None:
    """A recording with a floor, kept as it grows."""
    path = folder / "r.safetensors"
    with Partial(path, resume=resume) as kept:
        kept.begin({"value": str(value)})
        own = kept.recording("run", lambda note: recording(float(value)), print)
        runs = [
            run
            for number in range(3)
            for run in kept.runs(f"run {number}", lambda note: [_run(value)], print)
        ]
        floor = NoiseFloor(runs=tuple(runs))
        manifest = own.manifest.model_copy(update={"noise_floor": floor})
        Recording.in_memory(dict(own), manifest).save(path)
        kept.remove()


def _run(value: int) -> NoiseRun:
    return NoiseRun(kind=str(value), detail="", pair="float32/float32", tensors=())


def _read_measured(folder: Path) -> set[int]:
    found = Recording.open(folder / "r.safetensors")
    assert found.manifest.noise_floor is not None
    return _one(found["x"]) | {int(run.kind) for run in found.manifest.noise_floor.runs}


def _mend_measured(folder: Path) -> None:
    """Go on with what was stopped; it is of one value, whatever that is."""
    journal = folder / "r.safetensors.partial" / "journal"
    if journal.exists():
        line = journal.read_bytes().splitlines()[0].partition(b" ")[2]
        value = int(json.loads(line)["identity"]["value"])
        _write_measured(folder, value, resume=True)
        if _read_measured(folder) != {value}:
            raise ValueError("it went on with something else")


def _write_recorder(folder: Path, value: int) -> None:
    store = Recorder("full")
    store.put("x", torch.full((1000,), float(value)), "call")
    store.write(folder / "r.safetensors", "cpu", forwards=0)


# --- traces ----------------------------------------------------------------------------------


def _write_trace(folder: Path, value: int) -> None:
    net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    with truestep.capture(net, path=folder / "t.safetensors", level="full"):
        for _ in range(3):
            net(torch.full((100,), float(value)))


def _read_trace(folder: Path) -> set[int]:
    trace = Recording.open(folder / "t.safetensors")
    if len(trace) != 9:
        raise ValueError(f"{len(trace)} tensors")
    return set().union(*(_one(trace[name]) for name in trace))


def _mend_trace(folder: Path) -> None:
    """Make traces of what was left; all tensors in them are whole."""
    for spool in spools(folder / "t.safetensors"):
        try:
            partial = recover(spool, output=folder / f"{spool.name}.safetensors")
        except FileFormatError as error:
            if "journal cannot be read" not in error.what:
                raise
            shutil.rmtree(spool)  # killed before its first line
            continue
        for name in partial:
            _one(partial[name])


def _write_packed(folder: Path, value: int) -> None:
    from truestep.recording import spool as writer

    before, writer.PLAIN = writer.PLAIN, 0
    try:
        _write_trace(folder, value)
    finally:
        writer.PLAIN = before


# --- experiments, performance ----------------------------------------------------------------


def _write_samples(folder: Path, value: int) -> None:
    experiments.Store(folder).append(CELL, sample(value))


def _read_samples(folder: Path) -> set[int]:
    lines, _ = experiments.Store(folder).lines(CELL)
    return {line.place for line in lines if isinstance(line, Sample)}


def _write_experiment(folder: Path, value: int) -> None:
    store = experiments.Store(folder)
    plan = PLAN.model_copy(update={"rounds": value, "most_rounds": value})
    store.begin(plan, resume=(folder / "plan.json").exists())
    store.write_environment({"value": str(value)})
    store.save_tensors(CELL, "candidate", "c", {"latent": torch.full((100,), float(value))})


def _read_experiment(folder: Path) -> set[int]:
    store = experiments.Store(folder)
    text = json.loads((folder / "environment.json").read_text())
    kept = store.tensors(CELL, "candidate", "c")["latent"]
    return {store.plan().rounds, int(text["value"])} | _one(kept)


def _write_history(folder: Path, value: int) -> None:
    with open_history(folder / "perf.sqlite") as history:
        batch = history.begin(COHORT, started="2026-01-01T00:00:00", label=str(value))
        history.add(batch, make_run())
        history.add(batch, make_run())
        history.finish(batch, baseline=1)


def _read_history(folder: Path) -> set[int]:
    with open_history(folder / "perf.sqlite", create=False) as history:
        batches = history.batches(COHORT)
    if any(batch.complete and len(batch.runs) != 2 for batch in batches):
        raise ValueError("a batch that says it is complete is not")
    return {int(batch.label) for batch in batches if batch.complete}


# --- text ------------------------------------------------------------------------------------


def _write_ledger(folder: Path, value: int) -> None:
    entry = Component(
        family="wan",
        component=f"part{value}",
        kind="transformer",
        test="t.py",
        coverage_scope="both",
        evidence=Evidence(date="2026-01-01", raised="nothing"),
    )
    update_ledger(folder, [entry], date(2026, 1, 1))


def _read_ledger(folder: Path) -> set[int]:
    return {int(entry.component.removeprefix("part")) for entry in read_ledger(folder).component}


def _write_thresholds(folder: Path, value: int) -> None:
    data = {"cases": {"c": {"ssim_threshold": value / 10**6}}}
    thresholds.write(folder / "limits.json", thresholds.Thresholds("limits.json", data))


def _read_thresholds(folder: Path) -> set[int]:
    entry = thresholds.read(folder / "limits.json").cases["c"]
    return {round(entry["ssim_threshold"] * 10**6)}


@cache
def _comparison() -> Comparison:
    return truestep.compare({"x": torch.ones(4)}, {"x": torch.ones(4)})


def _write_results(folder: Path, value: int) -> None:
    told = _comparison().model_copy(update={"case_id": f"case{value}"})
    text = Results.of([told]).model_dump_json(indent=2)
    files.write_text(folder / "results.json", text, "the result")


def _read_results(folder: Path) -> set[int]:
    results = Results.model_validate_json((folder / "results.json").read_text())
    return {int(str(results.comparisons[0].case_id).removeprefix("case"))}


def _write_report(folder: Path, value: int) -> None:
    told = _comparison().model_copy(update={"case_id": f"case{value}"})
    html.write_many(folder / "report.html", [told])


def _read_report(folder: Path) -> set[int]:
    text = (folder / "report.html").read_text()
    if not text.rstrip().endswith("</html>"):
        raise ValueError("the report ends early")
    return {int(number) for number in re.findall(r"\bcase(\d+)\b", text)}


# --- the pytest plugin -----------------------------------------------------------------------

_TEST = """
import os, torch
def test_it(truestep):
    truestep.check(torch.arange(1.0, 65.0) + float(os.environ["VALUE"]))
"""


def _write_plugin(folder: Path, value: int) -> None:
    (folder / "test_it.py").write_text(_TEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    os.environ["VALUE"] = str(value)
    os.environ.pop("CI", None)
    there = os.getcwd()
    os.chdir(folder)
    for path in folder.glob("truestep-references/*/*/*/*.safetensors"):
        candidate_of(path).touch()  # of a check that had no reference
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            options = ["-q", "-p", "no:cacheprovider", "--truestep-update=all"]
            ended = pytest.main([*options, str(folder / "test_it.py")])
    finally:
        os.chdir(there)
    if ended:
        raise ValueError(f"pytest ended {ended}")


def _read_plugin(folder: Path) -> set[int]:
    store = Store(folder / "truestep-references")
    (place,) = store.places()
    values = Recording.open(store.verified(place))
    return _one(values[next(iter(values))] - torch.arange(1.0, 65.0))


WRITERS = (
    Writer("recording", _write_recording, _read_recording),
    Writer("recording with a floor", _write_measured, _read_measured, mend=_mend_measured),
    Writer("reference", _write_reference, _read_reference),
    Writer("references", _write_references, _read_references, keeps=True),
    Writer("recorder (standalone)", _write_recorder, _read_recording),
    Writer("trace", _write_trace, _read_trace, mend=_mend_trace),
    Writer("trace, packed", _write_packed, _read_trace, mend=_mend_trace),
    Writer("ab samples", _write_samples, _read_samples, keeps=True),
    Writer("ab plan and media", _write_experiment, _read_experiment),
    Writer("perf history", _write_history, _read_history, keeps=True),
    Writer("parity ledger", _write_ledger, _read_ledger, keeps=True),
    Writer("thresholds", _write_thresholds, _read_thresholds),
    Writer("results", _write_results, _read_results),
    Writer("report", _write_report, _read_report),
    Writer("pytest plugin", _write_plugin, _read_plugin, lines=False),
    *STORES,
)

RACERS = tuple(
    writer
    for writer in WRITERS
    if writer.name
    not in ("ab samples", "ab plan and media", "pytest plugin", "recording with a floor")
)
"""Those that may be several at once: an experiment, and a record, has one writer, which its lock
sees to."""

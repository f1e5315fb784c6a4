"""Run an experiment: record the baseline, check the candidate, then time the arms interleaved."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.case import Case
from truestep.environment import Environment
from truestep.errors import FOREIGN, FileFormatError, TruestepError, WriteError
from truestep.experiment.arms import Arm, Run, choose, digest, load_arm, own_backend, run
from truestep.experiment.cluster import Ended, Task, run_tasks
from truestep.experiment.judging import DECODED, final_row, repeat_row, sameness
from truestep.experiment.planning import arm_case, own_settings
from truestep.experiment.records import (
    ARMS,
    ArmName,
    Failure,
    Plan,
    PlannedCase,
    PlannedCell,
    Remark,
    Repeat,
    Sameness,
    Sample,
)
from truestep.experiment.stages import Compared, stages
from truestep.experiment.statistics import interval, order_of, paired_ratios
from truestep.experiment.store import Store
from truestep.experiment.table import complete_rounds
from truestep.files import write_text
from truestep.floors import NoiseFloor
from truestep.judge.floor import free_running, pair_of
from truestep.keys import FINALS
from truestep.reading import read
from truestep.recording.format import Recording
from truestep.replay.record import FloorChoice, record_pipeline
from truestep.runtime.loading import load

if TYPE_CHECKING:
    import torch

    from truestep.progress import Progress
    from truestep.runtime.applying import Apply


NO_COMPILER = ("InvalidCxxCompiler", "CppCompileError", "CppWrapperCompileError", "TritonMissing")
"""What torch.compile raises where no compiler works (torch 2.13, _inductor/exc.py)."""


class _ArmFailedError(Exception):
    """An arm raised; the cell ends, the others go on."""


def run_experiment(
    plan: Plan, store: Store, *, apply: Apply | None = None, progress: Progress | None = None
) -> None:
    """Run what is not there yet, cell by cell; everything is in the store as soon as it is known.

    Args:
        plan: Validated; the store has it already and is locked.
        store: Where results go, and where those of an earlier start are.
        apply: The change in the candidate.
        progress: Told (what, done, total).

    Raises:
        WriteError: A result could not be written; those before it are kept.
    """
    with _said_once("diffusers"):
        for cell in plan.cells:
            _Cell(plan, cell, store, apply, progress).run()
            gc.collect()


def run_on_cluster(
    plan: Plan,
    store: Store,
    *,
    change: Callable[[], Apply | None],
    accelerator: str | None = None,
    max_retries: int = 2,
    progress: Progress | None = None,
) -> None:
    """Run what is not there yet on the connected Ray cluster, every cell as one task.

    A cell whose worker was lost goes on elsewhere; one that fails each time is kept as a failure.

    Args:
        plan, store, progress: As in `run_experiment`; all workers must see the folder.
        change: Gives the change in the candidate, on the worker.
        accelerator: Type of accelerator that every cell needs, like `H200`; None needs one CPU.
        max_retries: How often a cell whose worker was lost is tried again.

    Raises:
        UsageError: A worker does not see the folder.
        WriteError: A failure could not be written.
    """
    shared = {store.folder / "plan.json": (store.folder / "plan.json").read_bytes()}
    first = {Path(cell.folder).name: cell for cell in reversed(plan.cells)}
    # Cells of both modes share a recording: who makes it comes before who reads it.
    waves = [[c for c in plan.cells if (c in first.values()) is makes] for makes in (True, False)]
    folder, done = store.folder.resolve(), 0
    known: dict[str, str] = {}
    for wave in waves:
        cells = {cell.name: cell for cell in wave}
        tasks = {name: Task(_run_cell, (plan, c, folder, change)) for name, c in cells.items()}
        running = run_tasks(tasks, accelerator=accelerator, max_retries=max_retries, shared=shared)
        with closing(running) as endings:
            for ended in endings:
                _keep(store, cells[ended.name], ended, known)
                done += 1
                if progress:
                    progress("cells", done, len(plan.cells))


def _run_cell(
    plan: Plan, cell: PlannedCell, folder: Path, change: Callable[[], Apply | None]
) -> dict[str, str]:
    """Run a cell on a worker; returns the worker's environment."""
    store = Store(folder)
    marker = _marker(store, cell)
    marker.unlink(missing_ok=True)
    with _said_once("diffusers"):
        _Cell(plan, cell, store, change(), None, marker=marker).run()
    marker.unlink(missing_ok=True)
    return dict(Environment.current())


def _marker(store: Store, cell: PlannedCell) -> Path:
    return store.folder / cell.folder / "doing.json"


def _keep(store: Store, cell: PlannedCell, ended: Ended, known: dict[str, str]) -> None:
    """Keep how a task ended: the environment it ran in, or its failure with what it was doing."""
    if ended.error is None:
        if not known:
            known.update(ended.value)
            store.write_environment(known)
        other = Environment(ended.value).differences(known)
        if other:
            keys = ", ".join(f"{d.key} {d.reference} -> {d.actual}" for d in other[:5])
            store.append(cell, Remark(text=f"it ran on another machine than the others: {keys}"))
        return
    marker = _marker(store, cell)
    try:
        doing = read(marker, "the marker cannot be read", Failure.model_validate_json)
    except FileFormatError:
        lines, _ = store.lines(cell)
        session = 1 + max((line.session for line in lines), default=-1)
        doing = Failure(arm="baseline", session=session, doing="starting", text="")
    text = str(ended.error) if ended.lost else f"{type(ended.error).__name__}: {ended.error}"
    store.append(cell, doing.model_copy(update={"text": text[:2000]}))
    marker.unlink(missing_ok=True)


@contextmanager
def _said_once(logger: str) -> Iterator[None]:
    """Let a library say each of its warnings once, not with every one of hundreds of runs."""
    seen: set[str] = set()

    def first(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in seen
        seen.add(text)
        return new

    with suppress(ImportError):  # its handler is made on import; loading says what is missing
        importlib.import_module(f"{logger}.utils.logging").get_logger(logger)
    handlers = list(logging.getLogger(logger).handlers)
    for handler in handlers:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(first)


class _Cell:
    """One cell while it runs."""

    def __init__(
        self,
        plan: Plan,
        cell: PlannedCell,
        store: Store,
        apply: Apply | None,
        progress: Progress | None,
        *,
        marker: Path | None = None,
    ) -> None:
        self.marker = marker  # where a process that may be lost leaves what it does
        self.plan, self.cell, self.store = plan, cell, store
        self.apply, self.progress = apply, progress
        lines, _ = store.lines(cell)
        self.session = 1 + max((line.session for line in lines), default=-1)
        samples = [line for line in lines if isinstance(line, Sample)]
        self.rounds = {found[0].round: found for found in complete_rounds(samples)}
        self.repeats = {
            (line.arm, line.case, line.latent, line.frames)
            for line in lines
            if isinstance(line, Repeat)
        }
        self.checked: dict[tuple[ArmName, str], tuple[str, str]] = {}  # digests
        self.floor: NoiseFloor | None = None
        self.early: Run | None = None

    def run(self) -> None:
        """Everything that is missing; what an arm raises is kept and ends the cell."""
        checked = all(self.store.check(self.cell, self._id(case)) for case in self.plan.cases)
        if checked and self._enough():
            return
        try:
            candidate = self._load("candidate") if checked else self._load_and_record()
            arms: dict[ArmName, Arm] = {
                "baseline": self._load("baseline"),
                "candidate": candidate,
                "control": self._load("control"),
            }
            self._check(arms)
            if self.early is not None:
                self._repeat("candidate", self.plan.cases[0], self.early)
                self.early = None
            self._warm_up(arms)
            while not self._enough():
                self._round(arms, self._next())
        except _ArmFailedError:
            return

    def _case(self, planned: PlannedCase, arm: ArmName) -> Case:
        own = own_settings(self.plan, arm, self.cell)
        return arm_case(planned, self.cell, own)[0]

    def _id(self, planned: PlannedCase) -> str:
        return Case(**planned.content).id

    @contextmanager
    def _raising(self, arm: ArmName, doing: str, case: str = "") -> Iterator[None]:
        """Keep what the block raises as a failure of the arm."""
        if self.marker:
            now = Failure(arm=arm, case=case, session=self.session, doing=doing, text="")
            write_text(self.marker, now.model_dump_json(), "what is running")
        try:
            yield
        except (WriteError, _ArmFailedError):
            raise
        except FOREIGN as error:  # an arm is the user's code: it may raise anything
            text = f"{type(error).__name__}: {error}"[:2000]
            failure = Failure(
                arm=arm,
                case=case,
                session=self.session,
                doing=doing,
                text=text,
                machine=any(name in text for name in NO_COMPILER),
            )
            self.store.append(self.cell, failure)
            raise _ArmFailedError from error

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(f"{self.cell.name}: {what}", done, total)

    def _load_and_record(self) -> Arm:
        """Load the candidate and record the baseline of every case, with its noise floor.

        The candidate goes first, because what is broken should cost little. A trusted baseline
        generates before and after that: what it gives must not change.
        """
        cases = self.plan.cases
        first = self._case(cases[0], "baseline")
        with self._raising("baseline", "loading"):
            trusted = Arm("baseline", load(first), {})
        with self._raising("baseline", "generating", cases[0].name):
            before = run(trusted, first).tensors
        candidate = self._load("candidate")
        with self._raising("candidate", "generating", cases[0].name):
            self.early = run(candidate, self._case(cases[0], "candidate"))
        with self._raising("baseline", "recording"):
            self._record(trusted)
            after = run(trusted, first).tensors
        recording = Recording.open(self.store.recording(self.cell, self._id(cases[0])))
        floor = free_running(recording.manifest.noise_floor)
        pair = pair_of(first.dtype, first.dtype)
        row = final_row(after, before, floor=floor, pair=pair)
        if row is None or not row.verdict.passed:
            self._remark(
                "the switch reaches all arms: the baseline gives other latents once the "
                "candidate is loaded",
                spoils=True,
            )
        return candidate

    def _record(self, trusted: Arm) -> None:
        """Record what is not recorded yet; the floor of a free run (nine generations) only once."""
        for number, planned in enumerate(self.plan.cases):
            path = self.store.recording(self.cell, self._id(planned))
            if path.exists():
                continue
            self._tell("recording", number, len(self.plan.cases))
            case = self._case(planned, "baseline")
            choose(trusted, case)
            floor: FloorChoice = "steps" if number else "final"
            with own_backend(trusted):
                recording = record_pipeline(trusted.pipe, case=case, floor=floor)
            recording.save(path)

    def _load(self, name: ArmName) -> Arm:
        """Load an arm, and notice if that changes something for the whole process."""
        self._tell(f"loading {name}", 0, 1)
        with self._raising(name, "loading"):
            own = own_settings(self.plan, name, self.cell)
            case, compiled = arm_case(self.plan.cases[0], self.cell, own)
            before = dict(Environment.current(case.settings.device))
            change = self.apply if name == "candidate" else None
            arm = load_arm(name, case, apply=change, compiled=compiled)
            leaked = Environment.current(case.settings.device).differences(before)
        if arm.shared:
            names = ", ".join(arm.shared[:5]) + (", ..." if len(arm.shared) > 5 else "")
            self._remark(f"the switch reaches all arms: it replaced {names}", spoils=True)
        if leaked:
            keys = ", ".join(f"{d.key} {d.reference} -> {d.actual}" for d in leaked)
            self._remark(f"the switch reaches all arms: loading {name} changed {keys}", spoils=True)
        return arm

    def _remark(self, text: str, *, spoils: bool = False) -> None:
        self.store.append(self.cell, Remark(session=self.session, text=text, spoils=spoils))

    def _check(self, arms: Mapping[ArmName, Arm]) -> None:
        """Run every arm once a case, keep latents and frames, and judge them."""
        for number, planned in enumerate(self.plan.cases):
            key = self._id(planned)
            path = self.store.recording(self.cell, key)
            recording = Recording.open(path) if path.exists() else None
            if recording is not None and self.floor is None:
                self.floor = recording.manifest.noise_floor
            if self.store.check(self.cell, key) is not None:
                continue
            self._tell("checking", number, len(self.plan.cases))
            made: dict[str, Run] = {}
            for name, arm in arms.items():
                with self._raising(name, "generating", planned.name):
                    made[name] = run(arm, self._case(planned, name))
                self.store.save_tensors(self.cell, name, key, made[name].tensors)
            self.store.save_check(self.cell, self._sameness(planned, arms, made, recording))

    def _sameness(
        self,
        planned: PlannedCase,
        arms: Mapping[ArmName, Arm],
        made: Mapping[str, Run],
        recording: Recording | None,
    ) -> Sameness:
        base, cand = self._case(planned, "baseline"), self._case(planned, "candidate")
        pairs = (pair_of(cand.dtype, base.dtype), pair_of(base.dtype, base.dtype))
        steps, shift = None, None
        if recording is not None:
            judged = recording
            if arm_case(planned, self.cell, self.plan.baseline)[1]:
                with self._raising("baseline", "recording compiled", planned.name):
                    choose(arms["baseline"], base)
                    pipe = arms["baseline"].pipe
                    with own_backend(arms["baseline"]):
                        compiled = record_pipeline(pipe, case=base, floor="none")
                    judged = with_floor(compiled, recording.manifest.noise_floor)
            compared = Compared(judged, base, cand, floor=free_running(self.floor), pair=pairs[0])
            try:
                choose(arms["candidate"], cand)
                with own_backend(arms["candidate"]):
                    pipe, label = arms["candidate"].pipe, self.plan.switch
                    steps, shift = stages(pipe, label, made["candidate"].tensors, compared)
            except (TruestepError, RuntimeError, ValueError, IndexError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                self._remark(f"{planned.name}: the stages could not be replayed ({reason})")
        return sameness(
            self._id(planned),
            {name: found.tensors for name, found in made.items()},
            steps=steps,
            floor=free_running(self.floor),
            pairs=pairs,
        ).model_copy(update={"shift": shift})

    def _repeat(
        self, name: ArmName, planned: PlannedCase, made: Run, *, number: int | None = None
    ) -> tuple[str, str]:
        """Judge what a generation left behind where it is not what was checked; its digests."""
        key, now = self._id(planned), _results(made.tensors)
        kept: dict[str, torch.Tensor] | None = None
        if (name, key) not in self.checked:
            kept = self.store.tensors(self.cell, name, key)
            self.checked[name, key] = _results(kept)
        before = self.checked[name, key]
        if now == before or (name, planned.name, *now) in self.repeats:
            return now
        if kept is None:
            kept = self.store.tensors(self.cell, name, key)
        row = repeat_row(
            made.tensors,
            self.store.tensors(self.cell, "baseline", key),
            decoded=kept if now[0] == before[0] else None,
            floor=self.floor,
            pair=pair_of(self._case(planned, name).dtype, self._case(planned, "baseline").dtype),
        )
        found = Repeat(
            arm=name,
            case=planned.name,
            round=number,
            session=self.session,
            latent=now[0],
            frames=now[1],
            checked=before[0],
            row=row,
        )
        self.store.append(self.cell, found)
        self.repeats.add((name, planned.name, *now))
        return now

    def _warm_up(self, arms: Mapping[ArmName, Arm]) -> None:
        first = self.plan.cases[0]
        for _ in range(self.plan.warmup):
            for name, arm in arms.items():
                with self._raising(name, "warming up", first.name):
                    made = run(arm, self._case(first, name))
                self._repeat(name, first, made)

    def _round(self, arms: Mapping[ArmName, Arm], number: int) -> None:
        """One case, every arm twice: an order drawn from the seed, and back."""
        planned = self.plan.cases[number % len(self.plan.cases)]
        order = order_of(ARMS, seed=f"{self.plan.seed}/{self.cell.name}/{number}")
        found: list[Sample] = []
        for place, name in enumerate(order):
            arm = arms[name]  # type: ignore[index]
            with self._raising(arm.name, "generating", planned.name):
                made = run(arm, self._case(planned, arm.name))
            latent, frames = self._repeat(arm.name, planned, made, number=number)
            sample = Sample(
                arm=arm.name,
                case=planned.name,
                round=number,
                session=self.session,
                place=place,
                seconds=made.seconds,
                stages_s=made.stages_s,
                memory_mib=made.memory_mib,
                memory_kind=made.memory_kind,
                forwards=made.forwards,
                latent=latent,
                frames=frames,
            )
            self.store.append(self.cell, sample)
            found.append(sample)
        self.rounds[number] = found
        self._tell("rounds", len(self.rounds), max(self.plan.rounds, len(self.rounds)))

    def _next(self) -> int:
        return next(number for number in range(len(self.rounds) + 1) if number not in self.rounds)

    def _enough(self) -> bool:
        done = len(self.rounds)
        if done < self.plan.rounds:
            return False
        if self.plan.until is None or done >= self.plan.most_rounds:
            return True
        runs = [[(s.arm, s.seconds) for s in found] for found in self.rounds.values()]
        ratios = paired_ratios(runs, actual="candidate", reference="baseline")
        return interval(ratios).half_width <= self.plan.until


def _results(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """Digests of what a generation left behind: of its final latents, and of what is decoded."""
    return _digests(tensors, FINALS), _digests(tensors, DECODED)


def _digests(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> str:
    """Of the video, and of the sound where there is one."""
    return " ".join(digest(tensors[name]) for name in names if name in tensors)


def with_floor(recording: Recording, floor: NoiseFloor | None) -> Recording:
    """The same recording, to be judged with a noise floor that was measured elsewhere."""
    manifest = recording.manifest.model_copy(update={"noise_floor": floor})
    return Recording.in_memory(dict(recording), manifest)

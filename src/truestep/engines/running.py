"""Run any program with its engine watched, and make recordings of what its processes left."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from truestep.calls.recording import CallRecording
from truestep.engines.assembling import ENGINE, Left, left_by, targets, write
from truestep.engines.run import Run
from truestep.engines.seams import seams
from truestep.engines.watch.injection import NOISE, SIGMAS, TIMESTEPS
from truestep.engines.watch.injection import write as write_injection
from truestep.engines.watch.request import VARIABLE, Looked, Request
from truestep.errors import TruestepError, UsageError, WriteError
from truestep.files import alive, require_room
from truestep.replay.program import with_site

EVERY_S = 1.0
"""How often it is looked whether a generation is over while the program runs."""


@dataclass
class Ran:
    """What came of a program.

    Attributes:
        code: Its exit code; 128 and the signal's number where one ended it.
        recordings: Path and recording of each generation and rank, in order.
        failures: What could not be made a recording of; its folder is left.
    """

    code: int
    recordings: list[tuple[Path, CallRecording]] = field(default_factory=list)
    failures: list[TruestepError] = field(default_factory=list)


def run_engine(
    program: Sequence[str],
    output: Path,
    *,
    engine: str = "",
    inject: CallRecording | None = None,
    largest: int = 1 << 29,
    inside: Looked | None = None,
    told: Callable[[Path, CallRecording], None] = lambda path, recording: None,
) -> Ran:
    """Run a program with what its engine does recorded; nothing in it is changed.

    Args:
        program: The command.
        output: The recording of its first generation; the second's is `.2`, a rank's `.rank1`.
        engine: Name of the engine; empty: whichever it imports.
        inject: A reference whose noise, text and schedule the engine is given.
        largest: Bytes of a tensor above which only its shape is kept.
        inside: Which calls of its denoisers are recorded with their modules.
        told: Of each recording when it is made, while the program may still run.

    Raises:
        UsageError: The program cannot be started, folders of an earlier one were left, or another
            is being recorded to the same output.
        WriteError: The output's folder cannot be written to.
    """
    output = output.absolute()
    require_room(output, "the recording")
    old = left_by(output)
    if old:
        raise UsageError(
            "calls of an earlier run were left",
            where=str(old[0].folder),
            likely="truestep was killed with it",
            hint=f"truestep engine recover {output}",
        )
    with _alone(output), TemporaryDirectory(prefix="truestep-") as folder:
        given = _written(inject, Path(folder)) if inject else ""
        request = Request(str(output), engine, largest, given, inside, tuple(program))
        try:
            process = subprocess.Popen(program, env=with_site(VARIABLE, request.text()))
        except OSError as error:
            raise UsageError(
                "the program cannot be started",
                where=program[0],
                measured=error.strerror or str(error),
                hint="truestep engine run -- python run.py",
            ) from None
        collected = _Collector(output, told)
        collected.start()
        try:
            with _ended_with_us(process):
                code = process.wait()
        except KeyboardInterrupt:  # the program has been interrupted, too, and ends by itself
            code = process.wait()
        finally:
            collected.stop()
    return Ran(code if code >= 0 else 128 - code, collected.made, collected.failures)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold an output for one run: two would take each other's calls for their own."""
    held = output.with_name(f".{output.name}.recording")
    own = output.with_name(f".{output.name}.{os.getpid()}.recording")
    own.write_text(str(os.getpid()), encoding="utf-8")
    try:
        while True:
            try:
                os.link(own, held)  # there at once, with what it says
                break
            except FileExistsError:
                owner = _owner(held)
                if owner is not None and alive(owner):
                    raise UsageError(
                        "another program is being recorded to this output",
                        where=str(output),
                        measured=f"process {owner}",
                        hint="wait for it, or give another --output",
                    ) from None
                held.unlink(missing_ok=True)  # of a process that was killed
            except OSError:  # a file system without links: nobody is kept out
                break
        try:
            yield
        finally:
            held.unlink(missing_ok=True)
    finally:
        own.unlink(missing_ok=True)


def _owner(held: Path) -> int | None:
    """The process that holds an output, if that can be read."""
    try:
        text = held.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand on that this process is to end: a server must not live on without its recorder."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _written(reference: CallRecording, folder: Path) -> str:
    write_injection(folder, inputs_of(seams(reference, label="reference")))
    return str(folder)


def inputs_of(run: Run) -> dict[str, torch.Tensor]:
    """What an engine can be given of a run: noise, schedule, text by branch."""
    found = {NOISE: run.noise, SIGMAS: run.sigmas, TIMESTEPS: run.timesteps}
    found |= {f"text/{branch}": text for branch, text in run.text.items()}
    return {name: value.contiguous() for name, value in found.items() if value is not None}


class _Collector:
    """Makes recordings of generations that are over; at the end of all that were left."""

    def __init__(self, output: Path, told: Callable[[Path, CallRecording], None]) -> None:
        self.made: list[tuple[Path, CallRecording]] = []
        self.failures: list[TruestepError] = []
        self._output, self._told = output, told
        self._seen: list[Left] = []
        self._done: set[Path] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """The program has ended: take everything."""
        self._over.set()
        self._thread.join()
        self._collect(ended=False)

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            self._collect(ended=True)

    def _collect(self, *, ended: bool) -> None:
        """Args: ended: only generations that are over."""
        known = {left.folder for left in self._seen}
        try:
            found = left_by(self._output)
        except TruestepError as error:
            self.failures += [] if ended else [error]
            return
        fresh = {left.folder: left for left in found}
        self._seen = [fresh.get(left.folder, left) for left in self._seen]
        self._seen += [left for left in found if left.folder not in known]
        for left, target in targets(self._output, self._seen):
            if left.folder in self._done or (ended and left.ended is None):
                continue
            self._done.add(left.folder)
            try:
                recording = write(left, target)
            except (TruestepError, WriteError) as error:
                self.failures.append(error)
                continue
            self.made.append((target, recording))
            self._told(target, recording)


def recover(
    output: Path, told: Callable[[Path, CallRecording], None] = lambda path, recording: None
) -> list[tuple[Path, CallRecording]]:
    """Make recordings of what a program left when truestep ended before it.

    A generation in which no call had ended is passed over; one that cannot be read keeps its folder
    and does not keep the others.

    Raises:
        UsageError: Nothing was left, or no call.
        FileFormatError: One cannot be read; all others are made.
    """
    output = output.absolute()
    left_behind = left_by(output)
    if not left_behind:
        raise UsageError(
            "no calls were left to recover",
            where=str(output),
            hint=f"ls -d {output.parent}/*.calls",
        )
    recovered: list[tuple[Path, CallRecording]] = []
    failures: list[TruestepError] = []
    empty: list[TruestepError] = []
    for left, target in targets(output, left_behind, keep=True):
        try:
            recording = write(left, target)
        except UsageError as error:
            empty.append(error)
            continue
        except TruestepError as error:
            failures.append(error)
            continue
        recovered.append((target, recording))
        told(target, recording)
    if failures or not recovered:
        raise (failures + empty)[0]
    return recovered


def injected(recording: CallRecording) -> dict[str, int]:
    """What an engine was given from outside, and how often."""
    return dict(recording.recording.manifest.settings.get(ENGINE, {}).get("injected", {}))

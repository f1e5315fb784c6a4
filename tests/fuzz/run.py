"""Damage good files in every way and read them: errors of the tree alone, bounded time and memory.

    python -m tests.fuzz.run --out fuzz-output                 the long run: `make fuzz`
    python -m tests.fuzz.run --repeat recording:123456         one mutant again, with its traceback

Counts are kept in `counts.json` after every thousand mutants, and a run goes on where it stopped. A
mutant is made from its kind, its number and the seed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from truestep.errors import TruestepError

MAIN_COUNT, OTHER_COUNT = 1_000_000, 10_000
"""Mutants of recordings, traces and sketches together, and of each other kind."""

UNIT = 1000
"""Mutants between two looks at the disk."""

SECONDS = 10.0
"""CPU time after which a mutant of a few kilobytes hangs; the slowest good one takes 0.1."""

SLACK, PER_BYTE = 96 * 2**20, 1100
"""Address space that a mutant may take beside this many times its size: what deflate can make of a
byte, and what an interpreter and an allocator keep: one more arena of glibc's is 64 MiB."""

_NO_MEMORY = re.compile("MemoryError|can't allocate|out of memory|not enough memory", re.IGNORECASE)

EXIT_CODES = (2, 3)
"""Of an error that says a file cannot be used, or that it is not what it is compared with."""


class HangError(Exception):
    """A mutant took too long."""


@dataclass
class Tally:
    """What came of mutants: refused with an error of the tree, or read."""

    done: int = 0
    refused: int = 0
    read: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another one's, too."""
        self.done += other.done
        self.refused += other.refused
        self.read += other.read
        self.failures += other.failures


class Bench:
    """The good files of one kind, and a place to put mutants."""

    def __init__(self, name: str, folder: Path, *, seed: int) -> None:
        from tests.fuzz.kinds import KINDS

        self.name, self.kind, self.seed = name, KINDS[name], seed
        self.good, self.place = folder / "good", folder / "mutant"
        self.good.mkdir(parents=True)
        self.kind.seeds(self.good)
        for path in self.good.rglob("*.safetensors"):
            path.write_bytes(_ordered(path.read_bytes()))
        self.names = sorted(path.name for path in self.good.iterdir())
        self.files = {name: _files_of(self.good / name) for name in self.names}
        for name in self.names:  # imports and tables are made by the good ones
            self.kind.use(self.put(name, self.files[name]), self.good / name)

    def mutant(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Which good file the mutant of a number is made of, and its files."""
        generator = random.Random(f"{self.seed}:{self.name}:{number}")
        name = generator.choice(self.names)
        files = dict(self.files[name])
        for _ in range(10):
            path = generator.choice(sorted(files))
            whole = f"{name}/{path}".rstrip("/")
            change = next((c for end, c in self.kind.mutators.items() if whole.endswith(end)), None)
            if change is None:
                continue
            with _deep_enough():
                files[path] = change(files[path], generator)
            if files[path] != self.files[name][path]:
                break
        return name, files

    def put(self, name: str, files: dict[str, bytes]) -> Path:
        """Write a mutant where nothing of the one before is left."""
        shutil.rmtree(self.place, ignore_errors=True)
        path = self.place / name
        for part, data in files.items():
            file = path / part if part else path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return path

    def use(self, number: int) -> str:
        """Read a mutant; what went wrong with it, or `refused` or `read`."""
        name, files = self.mutant(number)
        path = self.put(name, files)
        before = _peak()
        try:
            with _time_limit(SECONDS):
                self.kind.use(path, self.good / name)
            outcome = "read"
        except TruestepError as error:
            outcome = _judge(error)
        except HangError:
            return f"hang: more than {SECONDS} s"
        except RecursionError as error:
            return f"outside the tree: RecursionError: {error}"
        except Exception as error:
            return f"outside the tree: {type(error).__name__}: {str(error)[:300]}"
        grown = _peak() - before
        allowed = SLACK + PER_BYTE * sum(map(len, files.values()))
        if grown > allowed:
            return f"allocation: {grown:,} bytes of address space, {allowed:,} allowed"
        return outcome


def _judge(error: TruestepError) -> str:
    text = str(error)
    if text != text.encode("utf-8", "replace").decode():
        return f"an error that cannot be printed: {text[:300]!a}"
    if _NO_MEMORY.search(text):
        return f"allocation: {text[:300]}"
    if error.exit_code not in EXIT_CODES or len(text.splitlines()) > 25:
        return f"an error that is none: exit {error.exit_code}: {text[:300]}"
    return "refused"


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order, which the library writes in any."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _files_of(path: Path) -> dict[str, bytes]:
    """Files by their place below a path; a file is below itself as nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(part.relative_to(path)): part.read_bytes() for part in path.rglob("*") if part.is_file()
    }


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise HangError

    previous = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, where a destructor ate it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _peak() -> int:
    """Largest address space that this process has had, in bytes."""
    with open("/proc/self/status", "rb") as file:
        found = re.search(rb"VmPeak:\s+(\d+)", file.read())
    return int(found.group(1)) * 1024 if found else 0


def fuzz(bench: Bench, numbers: range, marker: Any = None) -> Tally:
    """Read the mutants of some numbers.

    Args:
        bench: Of their kind.
        numbers: Which mutants.
        marker: Told the number of each before it is read, for whoever finds this process dead.
    """
    tally = Tally()
    for number in numbers:
        if marker is not None:
            marker(number)
        outcome = bench.use(number)
        tally.done += 1
        tally.refused += outcome == "refused"
        tally.read += outcome == "read"
        if outcome not in ("refused", "read"):
            tally.failures.append(failure(bench, number, outcome))
    return tally


def failure(bench: Bench, number: int, outcome: str) -> dict[str, Any]:
    """What is kept of a mutant that went wrong."""
    repeat = f"python -m tests.fuzz.run --seed {bench.seed} --repeat {bench.name}:{number}"
    return {"kind": bench.name, "number": number, "outcome": outcome, "repeat": repeat}


@contextlib.contextmanager
def _deep_enough() -> Iterator[None]:
    """Let a mutator write nests that no reader follows, from whatever depth it is called at."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def keep(bench: Bench, number: int, folder: Path) -> Path:
    """Write a mutant to look at."""
    name, files = bench.mutant(number)
    target = folder / f"{bench.name}-{number}"
    shutil.rmtree(target, ignore_errors=True)
    bench.place = target
    return bench.put(name, files)


# --- the long run ----------------------------------------------------------------------------


def _in_child(bench: Bench, numbers: range, folder: Path) -> tuple[int, Path, Path]:
    """Start a process for some mutants; its number, what it will write, and where it is."""
    result = folder / f"result-{bench.name}-{numbers.start}"
    mark = folder / f"mark-{bench.name}-{numbers.start}"
    pid = os.fork()
    if pid:
        return pid, result, mark
    code = 1
    try:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + 60 + len(numbers))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))  # where no signal gets through
        handle = os.open(mark, os.O_RDWR | os.O_CREAT)
        bench.place = bench.place.with_name(f"mutant-{os.getpid()}")

        def marker(number: int) -> None:
            os.pwrite(handle, b"%020d" % number, 0)

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            tally = fuzz(bench, numbers, marker)
        shutil.rmtree(bench.place, ignore_errors=True)
        result.write_text(json.dumps(asdict(tally)), "utf-8")
        code = 0
    finally:
        os._exit(code)


def _ended(bench: Bench, numbers: range, status: int, result: Path, mark: Path) -> Tally:
    """What a process found; where it died, the mutant that did it, and the rest is left out."""
    if status == 0:
        return Tally(**json.loads(result.read_text("utf-8")))
    number = int(mark.read_bytes() or numbers.start)
    died = f"the process died: wait status {status}"
    return Tally(done=len(numbers), failures=[failure(bench, number, died)])


class Counts:
    """`counts.json`: how far each kind has come."""

    def __init__(self, path: Path, *, seed: int) -> None:
        self.path, self.seed = path, seed
        self.tallies: dict[str, Tally] = {}
        self.cpu_s = 0.0
        if path.exists():
            data = json.loads(path.read_text("utf-8"))
            if data["seed"] != seed:
                raise SystemExit(f"{path} is of seed {data['seed']}")
            self.tallies = {name: Tally(**tally) for name, tally in data["kinds"].items()}
            self.cpu_s = data["cpu_s"]

    def of(self, name: str) -> Tally:
        """Of a kind."""
        return self.tallies.setdefault(name, Tally())

    def write(self) -> None:
        """Replace the file."""
        kinds = {name: asdict(tally) for name, tally in self.tallies.items()}
        data = {
            "seed": self.seed,
            "mutants": sum(tally.done for tally in self.tallies.values()),
            "failures": sum(len(tally.failures) for tally in self.tallies.values()),
            "cpu_s": round(self.cpu_s, 1),
            "kinds": kinds,
        }
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(data, indent=1), "utf-8")
        fresh.replace(self.path)


def _wanted(names: list[str], count: int | None) -> dict[str, int]:
    """Kinds, and how many mutants of each."""
    from tests.fuzz.kinds import KINDS, MAIN

    share = -(-MAIN_COUNT // len(MAIN))
    return {
        name: count or (share if name in MAIN else OTHER_COUNT) for name in names or list(KINDS)
    }


def _units(wanted: dict[str, int], counts: Counts) -> Iterator[tuple[str, range]]:
    """What is still to be done, a unit of each kind in turn."""
    at = {name: counts.of(name).done for name in wanted}
    while any(at[name] < count for name, count in wanted.items()):
        for name, count in wanted.items():
            if at[name] < count:
                end = min(at[name] + UNIT, count)
                yield name, range(at[name], end)
                at[name] = end


def run(wanted: dict[str, int], *, seed: int, out: Path, processes: int) -> Counts:
    """Read all mutants that are wanted and not read yet, in as many processes."""
    out.mkdir(parents=True, exist_ok=True)
    counts = Counts(out / "counts.json", seed=seed)
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="truestep-fuzz-", dir=place) as work:
        folder = Path(work)
        benches = {name: Bench(name, folder / name, seed=seed) for name in wanted}
        running: dict[int, tuple[str, range, Path, Path]] = {}
        waiting: dict[str, dict[int, Tally]] = {name: {} for name in wanted}
        units = _units(wanted, counts)
        while True:
            while len(running) < processes and (unit := next(units, None)) is not None:
                name, numbers = unit
                pid, result, mark = _in_child(benches[name], numbers, folder)
                running[pid] = name, numbers, result, mark
            if not running:
                return counts
            oldest = next(iter(running))  # not any child: this process may have others
            _, status, usage = os.wait4(oldest, 0)
            name, numbers, result, mark = running.pop(oldest)
            counts.cpu_s += usage.ru_utime + usage.ru_stime
            tally = _ended(benches[name], numbers, status, result, mark)
            for path in (result, mark):
                path.unlink(missing_ok=True)
            for found in tally.failures:
                print(f"{found['outcome']}\n  {found['repeat']}", file=sys.stderr, flush=True)
                keep(benches[name], found["number"], out / "failures")
                benches[name].place = folder / name / "mutant"
            waiting[name][numbers.start] = tally
            while (ready := waiting[name].pop(counts.of(name).done, None)) is not None:
                counts.of(name).add(ready)  # in order: what is counted is what is done
            counts.write()


def repeat(what: str, *, seed: int, out: Path) -> int:
    """Make one mutant again, keep it, read it, and let what it raises be seen."""
    name, _, number = what.partition(":")
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(name, Path(work), seed=seed)
        path = keep(bench, int(number), out / "failures")
        print(f"mutant: {path}")
        outcome = bench.use(int(number))
        print(outcome)
        try:
            bench.kind.use(path, bench.good / path.name)
        except Exception:
            traceback.print_exc()
        return 0 if outcome in ("refused", "read") else 1


def main() -> int:
    """Parse the command line and run."""
    from tests.fuzz.kinds import KINDS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default all")
    parser.add_argument(
        "--count",
        type=int,
        help="mutants of each; default 10,000, or 1,000,000 "
        "of recordings, traces and sketches together",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-output"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", metavar="KIND:NUMBER")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.repeat:
        return repeat(arguments.repeat, seed=arguments.seed, out=arguments.out)
    began = time.monotonic()
    counts = run(
        _wanted(arguments.kinds, arguments.count),
        seed=arguments.seed,
        out=arguments.out,
        processes=arguments.processes,
    )
    failures = 0
    for name, tally in counts.tallies.items():
        print(
            f"{name:<14}{tally.done:>10,} mutants  {tally.refused:>9,} refused  "
            f"{tally.read:>9,} read  {len(tally.failures)} failures"
        )
        failures += len(tally.failures)
    print(f"{counts.cpu_s:,.0f} s of processor time in all, {time.monotonic() - began:,.0f} s here")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

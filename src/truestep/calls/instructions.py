"""The same run by other instructions: what a reference would have been on another processor.

References travel between machines, and kernels are chosen by what a processor can do. Which are
used is settled when a process first computes, so a run is taped (`tape`) and played by a process of
its own that is limited to the oldest set; where this one is limited so already, by one that is not.
It plays beside whatever else is measured. Not every library obeys on every processor: where a
product is the same to the bit in both processes, the other one sums products in parts, as kernels
of other widths do. What it gave is kept in `~/.cache/truestep` under the content of the tape, so
that the same thing is not run twice.
"""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash

from truestep.calls import tape as tapes
from truestep.calls.tape import Tape
from truestep.environment import Environment
from truestep.errors import WriteError
from truestep.files import write_text
from truestep.floors import NoiseRun
from truestep.recording.format import bytes_of
from truestep.runtime.lent import active
from truestep.verdict import Record

OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}
"""Variables that limit PyTorch, oneDNN and MKL to what any x86-64 processor can do. Of five sets
tried on the fault corpus's subjects this one was furthest from AVX-512 on most."""

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Variables that limit them to what most x86-64 processors can do."""

LIMITS = (*OLDEST, "MKL_ENABLE_INSTRUCTIONS", "DNNL_MAX_CPU_ISA")
"""Variables that a process may be limited by."""

PARTS: Mapping[str, int] = {
    "limited to the oldest": 3,
    "limited to AVX2": 5,
    "not limited": 3,
}
"""Partial sums of a product, by set, where its limit does not hold. Kernels have powers of two
themselves: in two parts MKL's small products were the same to the bit. Those of two runs are not
the same, or both would be one piece of evidence."""

MOST_BYTES = 4 * 2**30
"""Weights and inputs beyond this are not copied to another process."""

PATIENCE = 50.0
"""The other process may take as many times as long as the taped run, ..."""

STARTING_S = 120.0
"""... beside what it takes to start on a busy machine."""


class _Kept(Record):
    """What the cache holds of one tape."""

    key: str
    digest: str
    run: NoiseRun


InstructionSet = tuple[str, dict[str, str]]
"""Its name, and the variables that limit a process to it."""


def other_sets() -> tuple[InstructionSet, ...]:
    """Instruction sets to compare with, the one that is furthest off first; nothing on a processor
    that has one."""
    limited = any(name in os.environ for name in LIMITS)
    capability = torch.backends.cpu.get_cpu_capability()
    sets: list[InstructionSet] = []
    if capability != "DEFAULT":
        sets.append(("limited to the oldest", OLDEST))
    if limited:
        sets.append(("not limited", {}))
    if capability == "AVX512" or (capability == "DEFAULT" and limited):
        sets.append(("limited to AVX2", AVX2))
    return tuple(sets)


class Elsewhere:
    """A run that is made once here and once by other instructions; see the module's text.

    Entered for as long as the other process may run. `start` makes the run here, `run` collects.

    Args:
        note: Told why there is no run by other instructions, if so.
        identity: What runs, in a text that says all of it (case, weights, patches): a run that was
            kept under it is found without a tape. Empty where there is no such text.
        chosen: One of `other_sets`; default the first.
    """

    def __init__(
        self,
        note: Callable[[str], None],
        *,
        identity: str = "",
        chosen: InstructionSet | None = None,
    ) -> None:
        self._note, self._identity = note, identity
        self._folder = tempfile.TemporaryDirectory(prefix="truestep-")
        self._player: _Player | None = None
        self._cached: NoiseRun | None = None
        self._key = self._shortcut = ""
        self._known = False
        self._until = 0.0
        chosen = chosen or next(iter(other_sets()), None)
        self.detail = f"instructions {chosen[0]}" if chosen else ""
        self._variables = chosen[1] if chosen else {}
        self._parts = PARTS[chosen[0]] if chosen else 1

    def __enter__(self) -> Elsewhere:
        """Nothing runs yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing running that was not waited for, and remove what it read."""
        if self._player is not None:
            self._player.end()
        self._folder.cleanup()

    def known(self, recorded: Mapping[str, torch.Tensor]) -> bool:
        """Whether the run elsewhere is kept under its identity, so that none needs to be begun."""
        if self.detail and self._identity:
            self._shortcut = self._key_of({"identity": self._identity}, recorded)
            self._cached = _read(self._shortcut)
            self._known = self._cached is not None
        return self._known

    def start(
        self,
        again: Callable[[], Mapping[str, torch.Tensor]],
        recorded: Mapping[str, torch.Tensor],
        inputs: Iterable[torch.Tensor] | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """Make a run here, and begin it elsewhere.

        Args:
            again: Makes it.
            recorded: What it gave before; the noise is measured against this.
            inputs: Outputs that PyTorch did not make from these are left out.

        Returns:
            What `again` returned.
        """
        if not self.detail or self._known:
            return again()
        lender = active()
        if lender is not None and lender.stored:  # a tape would hold what is read, all of it
            self.refuse("weights stay in their files")
            return again()
        if self._player is not None:  # begun with another run
            self._player.end()
            self._player = None
        began, tape = time.perf_counter(), Tape()
        with tape:
            outputs = again()
        self._until = max(PATIENCE * (time.perf_counter() - began), 0.0) + STARTING_S
        numbers = {name: tape.number(tensor) for name, tensor in outputs.items()}
        known = {name: number for name, number in numbers.items() if number is not None}
        if inputs is not None:
            made = tape.made_from(inputs)
            known = {name: number for name, number in known.items() if number in made}
        problem = tape.problem
        if not known:
            problem = problem or "nothing that PyTorch made"
        elif tape.size() > MOST_BYTES:
            problem = problem or f"{tape.size() / 2**30:.1f} GB of weights are not copied"
        if problem:
            self.refuse(problem)
            return outputs
        told = {"operations": tape.operations, "outputs": known}
        tensors: dict[Any, torch.Tensor] = dict(tape.outside)
        tensors |= {name: recorded[name] for name in known}
        self._key = self._key_of(told, tensors)
        self._cached = _read(self._key)
        if self._cached is None:
            self._begin(tape, known)
        elif self._shortcut:
            _keep(self._shortcut, self._cached)
        return outputs

    def run(self, measured: Callable[[Mapping[str, torch.Tensor]], NoiseRun]) -> NoiseRun | None:
        """What the other process made, as `measured` measures it; None where there is nothing."""
        if self._cached is not None:
            return self._cached
        player, self._player = self._player, None
        if player is None:
            return None
        answer = player.answer(self._until)
        if answer != tapes.MADE:
            player.end()
            self.refuse(answer[:150])
            return None
        player.release()
        run = measured(torch.load(self._folder_path / "made", weights_only=True))
        for key in filter(None, (self._key, self._shortcut)):
            _keep(key, run)
        return run

    def _begin(self, tape: Tape, outputs: Mapping[str, int]) -> None:
        folder = self._folder_path
        try:
            tapes.save(tape, outputs, folder / "tape", flags=_flags(self._parts))
            self._player = _player(self._variables)
            self._player.ask(folder / "tape", folder / "made")
        except (OSError, RuntimeError) as error:  # no space, no processes
            self.refuse(str(error).splitlines()[0][:150])

    def _key_of(self, told: Mapping[str, object], tensors: Mapping[Any, torch.Tensor]) -> str:
        return _key((dict(told), _flags(self._parts), self._variables), tensors)

    @property
    def _folder_path(self) -> Path:
        return Path(self._folder.name)

    def refuse(self, problem: str) -> None:
        """Say why there is no run by other instructions."""
        self._note(f"noise floor without other instructions: {problem}")


class _Player:
    """A process that plays tapes one after the other; see `tape.main`."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)
        environment = {k: v for k, v in os.environ.items() if k not in LIMITS} | self.variables
        libraries = (environment.get("PYTHONPATH"), str(Path(torch.__file__).parents[1]))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, libraries))
        # The source goes along: this package need not be one that the process finds by itself.
        self._process = subprocess.Popen(
            [sys.executable, "-c", Path(tapes.__file__).read_text("utf-8")],
            env=environment,
            cwd=os.path.abspath(os.sep),  # it imports what lies there, which others must not write
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, source: Path, target: Path) -> None:
        """Have it play a tape."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{source}\t{target}\n")
        self._process.stdin.flush()

    def answer(self, seconds: float) -> str:
        """`tape.MADE`, or why there is nothing."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return f"the other process took more than {seconds:.0f} s"
        return self._process.stdout.readline().strip() or "the other process ended"

    def release(self) -> None:
        """Let the next one have it."""
        _idle.append(self)

    def disown(self) -> None:
        """Leave it to another process."""
        self._process.returncode = 0

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.communicate()


_idle: list[_Player] = []
"""Players that wait; a process starts once for many recordings."""


def _player(variables: Mapping[str, str]) -> _Player:
    for player in list(_idle):
        if player.variables == dict(variables):
            _idle.remove(player)
            if player.alive():
                return player
            player.end()
    return _Player(variables)


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    """In a child, players are the parent's."""
    for player in _idle:
        player.disown()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)


def prepare() -> None:
    """Start a player that a recording will need, beside its first run, where there is a core."""
    chosen = other_sets()
    if chosen and not _idle and (os.cpu_count() or 1) > 1:
        with suppress(OSError):
            _idle.append(_Player(chosen[0][1]))


def _flags(parts: int) -> dict[str, object]:
    return {
        "parts": parts,
        "products": tapes.products(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": bool(torch._C._get_mkldnn_enabled()),
    }


# --- what was measured before ---------------------------------------------------------------------


def cache_folder() -> Path:
    """Where runs by other instructions are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "truestep" / "instructions"


def _key(told: Iterable[Mapping[str, object]], tensors: Mapping[Any, torch.Tensor]) -> str:
    """Hash of all that such a run depends on: what runs, its tensors, machine and libraries."""
    digest = xxhash.xxh3_128()
    for thing in told:
        digest.update(repr(thing).encode())
    limits = {name: os.environ.get(name) for name in LIMITS}
    digest.update(repr((sorted(Environment.current("cpu").items()), limits)).encode())
    for name, tensor in tensors.items():
        digest.update(repr((name, tensor.dtype, tensor.shape, tensor.stride())).encode())
        digest.update(bytes_of(tensor.detach()))
    return digest.hexdigest()


def _digest(run: NoiseRun) -> str:
    return xxhash.xxh3_128_hexdigest(run.model_dump_json().encode())


def _read(key: str) -> NoiseRun | None:
    """A kept run; one that is not whole, or not of this key, is as good as none."""
    try:
        content = (cache_folder() / f"{key}.json").read_bytes()
        kept = _Kept.model_validate_json(content)
    except (OSError, RuntimeError, ValueError):  # not there, no home folder, damaged
        return None
    return kept.run if kept.key == key and kept.digest == _digest(kept.run) else None


def _keep(key: str, run: NoiseRun) -> None:
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        kept = _Kept(key=key, digest=_digest(run), run=run)
        write_text(folder / f"{key}.json", kept.model_dump_json(), "cache entry")
    except (OSError, RuntimeError, WriteError):  # a cache that cannot be written costs time alone
        return

"""Run tasks on a Ray cluster, each in a process of its own; what breaks one leaves the others."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from truestep.errors import MissingExtraError, TruestepError, UsageError

_QUIET = {
    "OMP_NUM_THREADS": "1",  # the processes of a local cluster inherit it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of what a later one will do
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else it prints on stdout that a worker was lost
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # its 15 lets all other work on the machine go before
}

_OWN = {"include_dashboard": False, "object_store_memory": 256 * 2**20}
"""Of a cluster on this machine. Results are small, and Ray spills to disk what is larger."""


@dataclass(frozen=True)
class Task:
    """A call: a function that the workers can import, and its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a task ended: with a value, or with an error.

    `lost` says that its worker ended without an answer, each time.
    """

    name: str
    value: Any = None
    error: Exception | None = None
    lost: bool = False


class _Unseen(tuple[str, str]):
    """A path that a worker does not see, and the machine it is on."""


@contextmanager
def connected(address: str, *, accelerator: str | None = None) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; leave it however the block ends.

    A connection that this process has already is used and kept.

    Args:
        address: `local`, or what Ray takes: `host:6379`, `auto`.
        accelerator: A type of accelerator that the cluster must have, in Ray's words: `H200`.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: There is no such cluster, or it has no such accelerator.
    """
    with patch.dict(os.environ, _QUIET):
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray", "--ray") from None
        if ray.is_initialized():
            _require(accelerator)
            yield
            return
        try:
            _start(address)
            _require(accelerator)
            yield
        finally:
            ray.shutdown()


def _start(address: str) -> None:
    import ray

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    own = _OWN if address == "local" else {}
    try:
        if colon and port.isdigit():  # Ray itself would try for a quarter of an hour
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"there is no Ray cluster at {address}" if not own else "Ray does not start",
            where=f"--ray {address}",
            measured=" ".join(str(error).split())[:300],
            likely="" if own else "it does not run, or it asks for a token (RAY_AUTH_TOKEN)",
            hint="ray start --head  # starts a cluster; --ray local needs none",
        ) from error


def _require(accelerator: str | None) -> None:
    """Refuse what no machine of the cluster has: a task for it would wait for ever."""
    import ray

    found = [name.partition("accelerator_type:")[2] for name in ray.cluster_resources()]
    types = sorted(filter(None, found))
    if accelerator is not None and accelerator not in types:
        raise UsageError(
            f"no machine of the cluster has an accelerator of type {accelerator!r}",
            where=f"--accelerator {accelerator}",
            measured=f"it has: {', '.join(types)}" if types else "it has none",
            hint="ray status  # lists the resources of a cluster",
        )


def _lost(error: Exception, times: int) -> TruestepError:
    return TruestepError(
        f"its worker was lost {times} times",
        measured=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        likely="it crashes its process or runs out of memory, or machines went away",
    )


def run_tasks(
    tasks: Mapping[str, Task],
    *,
    accelerator: str | None = None,
    max_retries: int = 2,
    shared: Mapping[Path, bytes | None] | None = None,
) -> Generator[Ended]:
    """Run tasks on the connected cluster and yield each as it ends; see `connected`.

    Every try has a fresh process, with one thread, in this process's working folder. A task that
    raises is not tried again; one whose worker is lost is.

    Args:
        tasks: Name to task.
        accelerator: Ask for one accelerator of this type; None asks for one CPU.
        max_retries: How often a task whose worker was lost is tried again.
        shared: Files and folders that every worker must see, with their content where it matters.

    Raises:
        UsageError: A worker does not see what it should share.
    """
    import ray

    wanted = {"num_gpus": 1, "accelerator_type": accelerator} if accelerator else {"num_cpus": 1}
    # Ray's own retries have no end where a worker runs out of memory: they are counted here.
    worker = ray.remote(max_retries=0, max_calls=1, **wanted)(_on_worker)
    seen = {str(path.resolve()): content for path, content in (shared or {}).items()}
    pending: dict[Any, str] = {}
    signals = ExitStack()
    tries = dict.fromkeys(tasks, 0)

    def submit(name: str) -> None:
        tries[name] += 1
        pending[worker.remote(tasks[name], str(Path.cwd()), seen)] = name

    try:
        stopped = signals.enter_context(_interrupts())
        for name in tasks:
            submit(name)
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
            if stopped():
                raise KeyboardInterrupt
            if not ready:
                continue
            ref = ready[0]
            name = pending.pop(ref)
            try:
                value = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                yield Ended(name, error=error.cause or error)
                continue
            except ray.exceptions.RayError as error:
                if tries[name] <= max_retries:
                    submit(name)
                    continue
                yield Ended(name, error=_lost(error, tries[name]), lost=True)
                continue
            if isinstance(value, _Unseen):
                raise UsageError(
                    "a worker does not see the files it should share",
                    where=value[0],
                    measured=f"absent on {value[1]}, or another file",
                    hint="run in a folder that all machines share; --ray local needs none",
                )
            yield Ended(name, value)
    finally:
        signals.close()
        for ref in pending:
            ray.cancel(ref, force=True)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Remember an interrupt: one that comes while Ray's own callbacks run raises inside them, and
    is lost there.

    Yields:
        A function that says whether there was one.
    """
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _on_worker(task: Task, folder: str, seen: Mapping[str, bytes | None]) -> Any:
    """Call the task's function, in the folder and with the files of whoever asked."""
    for path, content in ({folder: None} | dict(seen)).items():
        found = Path(path)
        if not found.exists() or (content is not None and found.read_bytes() != content):
            return _Unseen((path, socket.gethostname()))
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
    return task.function(*task.arguments)

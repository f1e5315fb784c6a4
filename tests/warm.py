"""Run the command line in a process of its own that was forked after the heavy imports.

`python -m truestep` spends most of its seconds on importing torch and diffusers. Here one process
has done so, and forks for each command: what runs is `truestep.cli.main`, with its own guard, exit
code, streams and end. tests/test_warm holds it to `python -m truestep`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

HEAVY = (
    *("diffusers", "peft", "scipy.optimize", "scipy.stats", "transformers"),
    *("truestep.cli.app", "truestep.cli.check", "truestep.cli.record", "truestep.cli.ab"),
    *("truestep.engines.diffusers", "truestep.experiment.running", "truestep.pairing"),
    *("truestep.replay.check", "truestep.replay.record", "truestep.replay.trace"),
    "truestep.runtime.wan",
)
"""Modules that most commands import."""

CLASSES = {
    "diffusers": ("AutoencoderKL", "AutoencoderKLWan", "FluxPipeline", "WanPipeline"),
    "transformers": ("AutoTokenizer", "CLIPTextModel", "T5EncoderModel", "UMT5EncoderModel"),
}
"""Classes of libraries that import what they need when they are first named."""


class Command(Protocol):
    """Arguments of the command line to its end."""

    def __call__(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]: ...


@contextmanager
def warm() -> Iterator[Command]:
    """A function that runs a command in a fork of one process, which ends with the block."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm"],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    asked, answers = server.stdin, server.stdout

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            where = {
                name: f"/proc/{os.getpid()}/fd/{file.fileno()}"
                for name, file in (("out", out), ("err", err))
            }
            told = {"arguments": arguments, "cwd": str(cwd), "env": dict(os.environ), **where}
            asked.write(json.dumps(told) + "\n")
            asked.flush()
            code = int(answers.readline())
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())

    try:
        yield run
    finally:
        asked.close()
        answers.close()
        server.wait()


def serve() -> None:
    """Fork for each line of stdin; say how the command ended."""
    for name in HEAVY:
        importlib.import_module(name)
    for module, names in CLASSES.items():
        for name in names:
            getattr(importlib.import_module(module), name)
    for line in sys.stdin:
        told = json.loads(line)
        child = os.fork()
        if child == 0:
            become(told)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(told: dict[str, object]) -> None:
    """Be the process that was asked for, in all that a command may look at; run it."""
    assert len(os.listdir("/proc/self/task")) == 1, "with threads, the guard would not fork"
    import truestep

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(str(told[name]), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(told["env"])  # type: ignore[call-overload]
    os.chdir(str(told["cwd"]))
    sys.path[0] = str(told["cwd"])
    sys.argv = [str(Path(truestep.__file__).parent / "__main__.py"), *told["arguments"]]  # type: ignore[misc]
    from truestep.cli import main

    main()


if __name__ == "__main__":
    serve()

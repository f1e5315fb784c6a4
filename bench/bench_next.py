"""Where does a program get to that does only what it is told: that follows `next`?

Faults of the corpus are planted by `--apply`; the program starts with one command, reads its brief,
runs the `next` of that, and so on. It is there when a brief names a module declared with the fault.
Every command runs as the words that were printed, through the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.bench_location import globals_restored, outcome
from bench.common import RESULTS
from bench.faults.draws import DRAWS
from bench.faults.entry import Fault
from bench.faults.places import places
from bench.faults.port import PORTED
from bench.faults.registry import FAULTS
from bench.faults.subjects import Wan, subjects
from truestep.cli import run_here

MOST = 6
"""Commands, the first with them."""

STARTS = {"check": (), "check of the end": ("--depth", "final")}
"""The first command: what stands behind `truestep check CASE --apply ...`."""


@dataclass(frozen=True)
class Walk:
    """One fault, and the commands from the first to the last.

    Attributes:
        outcome: As `bench_location` says it of the module that was named last.
        commands: That were run. ended: why there was none after them.
    """

    subject: str
    start: str
    port: str
    entry: str
    outcome: str
    named: str | None
    commands: tuple[str, ...]
    ended: str
    seconds: float


def main() -> int:
    """Walk, and write `next.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    walks = []
    output = options.output.resolve()
    with _folder():
        for subject, start, port, entry in chosen(options.count):
            walks.append(walk(subject, start, port, entry))
            print(_line(walks[-1]), file=sys.stderr, flush=True)
    (output / "next.md").write_text(report(walks), "utf-8")
    return 0


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="truestep-next-") as name, contextlib.chdir(name):
        yield


def chosen(count: int) -> list[tuple[Wan, str, str, Fault]]:
    """So many faults: evenly over the corpus; models, ports and first commands in turn."""
    names = ("tiny-wan2.1", "digits", "tiny-wan2.2-5b")
    models = [each for each in subjects(names) if isinstance(each, Wan)]
    same = [e for e in FAULTS.values() if e.where and "wan" in e.subjects and not e.slow]
    every = [("same names", entry) for entry in same]
    every += [("renamed, fused", entry) for entry in PORTED.values() if not entry.slow]
    picked = [every[at * len(every) // count] for at in range(min(count, len(every)))]
    starts = list(STARTS)
    return [
        (models[at % len(models)], starts[at % 5 == 4], port, entry)
        for at, (port, entry) in enumerate(picked)
    ]


def walk(subject: Wan, start: str, port: str, entry: Fault) -> Walk:
    """Follow `next` until the module is named, nothing is told, or it goes round."""
    began = time.perf_counter()
    _prepare(subject)
    apply = ("--apply", _planted(port, entry))
    command = shlex.join(["truestep", "check", subject.name, *STARTS[start], *apply])
    wanted = places(entry.where, getattr(subject.load(DRAWS[0], "float32"), entry.model))
    commands: list[str] = []
    named, ended = None, f"after {MOST} commands"
    while len(commands) < MOST:
        commands.append(command)
        brief = told(command)
        found = [item["place"].get("module") for item in brief.get("items", ()) if "place" in item]
        named = next((module for module in found if module), None)
        if outcome(named, wanted) == "exact" or brief["exit_code"] == 0:
            ended = "named" if named else brief["verdict"]
            break
        command = brief.get("next", "")
        if not command or command in commands:
            ended = "goes round" if command else f"no next: {brief.get('decide', '')}"
            break
    return Walk(
        subject=subject.name,
        start=start,
        port=port,
        entry=entry.name,
        outcome="without effect" if ended == "identical" else outcome(named, wanted),
        named=named,
        commands=tuple(commands),
        ended=ended,
        seconds=round(time.perf_counter() - began, 1),
    )


def _prepare(subject: Wan) -> None:
    """The case file and the reference of a subject, once."""
    case = subject.case(DRAWS[0], "float32")
    file = Path("truestep.toml")
    text = file.read_text("utf-8") if file.is_file() else ""
    if f'[case."{subject.name}"]' in text:
        return
    values = {k: v for k, v in case.model_dump().items() if k in _KEYS and v is not None}
    lines = [f'[case."{subject.name}"]', *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    file.write_text(text + "\n".join([*lines, 'settings = { device = "cpu" }', ""]), "utf-8")
    done = told(shlex.join(["truestep", "record", subject.name, "--floor", "final"]), brief=False)
    assert done["exit_code"] == 0, done


_KEYS = (
    *("model", "prompt", "seed", "dtype", "steps", "height", "width", "num_frames"),
    *("guidance_scale", "max_sequence_length"),
)


def _planted(port: str, entry: Fault) -> str:
    """The file and function of a change, as a user would write them."""
    registry = (
        "bench.faults.registry.FAULTS" if port == "same names" else "bench.faults.port.PORTED"
    )
    module, _, name = registry.rpartition(".")
    stem = f"change_{name.lower()}_{entry.name.replace('-', '_')}"
    Path(f"{stem}.py").write_text(
        f"from {module} import {name}\n\n\ndef change(pipe):\n"
        f"    return {name}[{entry.name!r}].apply(pipe)\n",
        "utf-8",
    )
    return f"{stem}.py:change"


def told(command: str, *, brief: bool = True) -> dict[str, Any]:
    """Run a command as it was printed; its brief."""
    words = shlex.split(command)
    if brief and "--brief" not in words:
        words += ["--brief", "-"]
    out, err, kept = io.StringIO(), io.StringIO(), sys.argv
    with globals_restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = words
        try:
            code = run_here()
        finally:
            sys.argv = kept
    if not brief:
        return {"exit_code": code, "out": out.getvalue(), "err": err.getvalue()}
    try:
        found: dict[str, Any] = json.loads(out.getvalue())
    except ValueError:
        text = f"{command}\n{out.getvalue()}\n{err.getvalue()}"
        raise SystemExit(f"not a brief: {text}") from None
    return {"exit_code": code, **found}


def report(walks: Sequence[Walk]) -> str:
    """The table as Markdown."""
    counted = [each for each in walks if each.outcome != "without effect"]
    exact = [each for each in counted if each.outcome == "exact"]
    spent = sorted(len(each.commands) for each in exact)
    most, usual = (spent[-1], spent[len(spent) // 2]) if spent else (0, 0)
    lines = [
        "# Following `next`",
        "",
        f"{len(exact)} of {len(counted)} planted modules were reached by a program that runs the "
        f"`next` of each brief and knows nothing else, in at most {most} commands ({usual} "
        f"usually). {len(walks) - len(counted)} faults changed no bit of what a check looks at.",
        "",
        "| fault | model | port | first command | commands | outcome | named | ended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in walks:
        cells = (each.entry, each.subject, each.port, each.start, str(len(each.commands)))
        lines.append(
            f"| {' | '.join(cells)} | {each.outcome} | {each.named or ''} | {each.ended} |"
        )
    return "\n".join([*lines, ""])


def _line(each: Walk) -> str:
    where = f"{each.subject:14s} {each.port:14s} {each.start:16s} {each.entry:32s}"
    return f"{where} {len(each.commands)} {each.outcome} {each.named} {each.ended} {each.seconds}s"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())

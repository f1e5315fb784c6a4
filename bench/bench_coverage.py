"""Every pipeline class of the installed diffusers: is it built tiny, does it run, is it replayed?

    python -m bench.bench_coverage [NAME ...] [--seconds 60] [--docs docs/families.md]

Each class is built without a hub and run twice, and both runs must agree bit for bit. Then calls
of a second one are recorded, written and read back, and replayed on two more: once answered from
the recording, once with every call made live on what was recorded. Both must be equal bit for bit.

Classes run one after another in one process; where one takes longer than the limit, that process
is ended and a new one goes on after it. Rows are kept (bench/results/coverage.jsonl); the table of
all of them goes to the file that --docs names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 60.0
ROWS = Path(__file__).parent / "results" / "coverage.jsonl"
OUTCOMES = ("replayed", "runs", "built", "no")


@dataclass
class Row:
    """What became of one class.

    Attributes:
        name: The class, or the modular configuration.
        kind: What it makes of what, by its arguments and outputs.
        components: Classes of the components, by name.
        outcome: `replayed`, `runs` (but is not replayed), `built` (but does not run) or `no`.
        reason: Why not further.
        calls: Calls recorded.
        seconds: Process time of all of it.
    """

    name: str
    kind: str = ""
    components: dict[str, str] | None = None
    outcome: str = "no"
    reason: str = ""
    calls: int = 0
    seconds: float = 0.0


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether two runs gave the same bits, not-a-number where the other has it included."""
    import torch

    return len(first) == len(second) and all(
        a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
        for a, b in zip(first, second, strict=True)
    )


def kind_of(call: dict[str, Any], output: list[Any], pipe: Any) -> str:
    """What a pipeline makes of what, as the model hub names tasks."""
    given = {"image", "images", "video", "control_image", "control_video", "audio"} & set(call)
    source = "text" if "prompt" in call or "lyrics" in call else "noise"
    if given & {"video", "control_video"} or "pose_video" in call:
        source = "video"
    elif given & {"image", "images", "control_image"}:
        source = "image"
    elif "audio" in given:
        source = "audio"
    slots = set(pipe.components)
    if "audio_vae" in slots:
        return f"{source} to video and audio"
    shapes = [leaf.ndim for leaf in output if leaf.ndim]
    rank = shapes[0] if shapes else 0
    pixels = any(leaf.ndim == 3 and leaf.shape[-1] in (3, 4) for leaf in output)
    quiet = pixels or slots & {"image_encoder", "unet"}
    sound = (rank in (1, 2, 3) and not quiet) or "vocoder" in slots
    target = "video" if rank == 5 else "audio" if sound else "image" if rank >= 3 else "embedding"
    return f"{source} to {target}"


def cover(name: str, folder: Path) -> Row:
    """Build, run, record and replay one class or modular configuration."""
    import torch

    from truestep.testing import tiny
    from truestep.testing.outputs import leaves

    row = Row(name)
    start = time.process_time()
    try:
        pipe = built(name)
        row.outcome = "built"
        row.components = {
            slot: type(part).__name__ for slot, part in pipe.components.items() if part is not None
        }
        call = tiny.example_call(name)
        torch.manual_seed(0)  # some pipelines encode a control picture without their generator
        first = list(leaves(pipe(**call)))
        torch.manual_seed(0)
        second = list(leaves(pipe(**tiny.example_call(name))))
        row.kind = kind_of(call, first, pipe)
        if not first:
            row.reason = "gives no tensor"
        elif not all(
            bool(torch.isfinite(leaf).all()) for leaf in first if leaf.is_floating_point()
        ):
            row.reason = "not finite"
        elif not same(first, second):
            row.reason = "two runs differ"
        else:
            row.outcome = "runs"
            row.reason, row.calls = replayed(name, folder)
            if not row.reason:
                row.outcome = "replayed"
    except Exception as error:
        row.reason = row.reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    row.seconds = round(time.process_time() - start, 2)
    return row


def built(name: str) -> Any:
    """A tiny pipeline that shows no progress."""
    from truestep.testing import tiny

    pipe = tiny.pipeline(name)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def replayed(name: str, folder: Path) -> tuple[str, int]:
    """Record the calls of a run, read them back, replay them on other pipelines: what differs.

    Returns:
        What is wrong, or nothing; and the number of calls.
    """
    from truestep.calls.blocks import BLOCK
    from truestep.calls.forcing import Forcing
    from truestep.calls.recorder import recorded
    from truestep.calls.recording import read
    from truestep.calls.seen import Plan
    from truestep.calls.subject import subject_of
    from truestep.testing import tiny

    path = folder / "calls.safetensors"
    recorded(subject_of(built(name), **tiny.example_call(name))).write(path)
    reference = read(path)
    calls = sum(call.component != BLOCK for call in reference.calls)
    for title, made in (("played back", False), ("replayed live", True)):
        other = built(name)
        plan = Plan(made=lambda call, made=made: made)  # type: ignore[misc]
        wrong = differences(
            Forcing(reference, plan).run(subject_of(other, **tiny.example_call(name))), reference
        )
        if wrong:
            return f"{title}: {wrong[0]}", calls
    return "", calls


def differences(result: Any, reference: Any) -> list[str]:
    """What a forced run shows that the recording does not hold."""
    from truestep.measure.distance import same_bits

    rows = [f"{call.component}.{call.method} was not called" for call in result.missing]
    rows += [f"{component}.{method} was called as well" for component, method in result.unexpected]
    rows += [result.raised] if result.raised else []
    for seen in result.seen:
        if seen.actual is None or seen.recorded is None or seen.odd:
            rows.append(f"{seen.key} {seen.note}")
        elif isinstance(seen.recorded, str):
            if not same_bits(seen.actual, reference.recording[seen.recorded]):
                rows.append(f"{seen.key} differs")
        elif float(seen.actual) != float(seen.actual.new_tensor(seen.recorded)):
            rows.append(f"{seen.key} differs")  # numbers are kept as they are used, in float32
    return rows


def worker(names: list[str]) -> None:
    """Cover classes one after another, a line of JSON each."""
    import diffusers
    import torch
    import transformers

    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("ready", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(json.dumps(asdict(cover(name, Path(folder)))), flush=True)


def rows(names: list[str], seconds: float) -> Iterator[Row]:
    """Cover classes in a process that is ended and begun anew where one takes too long."""
    left = list(names)
    while left:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.bench_coverage", "--worker", *left],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        lines.get()  # "ready": what is imported is not counted
        while left:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                line = ""
            name = left.pop(0)
            if not line:
                ended = process.poll() is not None
                yield Row(name, reason="ends the process" if ended else f"over {seconds:.0f} s")
                break
            yield Row(**json.loads(line))
        process.kill()
        process.wait()


def _read(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of earlier runs, by name."""
    if not path.exists():
        return {}
    found = [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return {row.name: row for row in found}


def write_rows(path: Path, table: dict[str, Row]) -> None:
    """Write all rows, in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(table[name])) for name in sorted(table)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def document(table: list[Row]) -> str:
    """The table as Markdown, classes by what they make."""
    standard = [row for row in table if "/" not in row.name]
    modular = [row for row in table if "/" in row.name]
    good = [row for row in table if row.outcome == "replayed"]
    configurations = (
        f"; so are {sum('/' in row.name for row in good)} of {len(modular)} configurations of "
        "modular pipelines"
    )
    version = importlib.metadata.version("diffusers")
    lines = [
        "# Pipelines that are recorded and replayed",
        "",
        f"Of the {len(standard)} pipeline classes that diffusers {version} exports, "
        f"{sum('/' not in row.name for row in good)} are built as tiny random pipelines "
        "(`truestep tiny CLASS FOLDER`), run, recorded call by call, written, read, played back",
        "and replayed live on a freshly built pipeline, bit for bit"
        + (configurations if modular else "")
        + ".",
        "The rest is listed with the reason. Written by `make coverage`.",
        "",
    ]
    for kind in sorted({row.kind for row in good}):
        chosen = [row for row in good if row.kind == kind]
        lines += [f"## {kind.capitalize()} ({len(chosen)})", "", "| class | components | calls |"]
        lines += ["|---|---|---|"]
        for row in chosen:
            parts = ", ".join(
                f"{slot} {cls}"
                for slot, cls in (row.components or {}).items()
                if not cls.endswith(("Tokenizer", "Processor", "ProcessorPil"))
            )
            lines.append(f"| {row.name} | {parts} | {row.calls} |")
        lines.append("")
    rest = [row for row in table if row.outcome != "replayed"]
    lines += [
        f"## Not replayed ({len(rest)})",
        "",
        "| class | as far as | reason |",
        "|---|---|---|",
    ]
    lines += [f"| {row.name} | {row.outcome} | {_cell(row.reason)} |" for row in rest]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("\n", " ").split())[:160]


def main() -> None:
    """Cover all classes, or those that are named."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=LIMIT_S)
    parser.add_argument("--rows", type=Path, default=ROWS, help="rows so far, which are kept")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.names)
        return
    from truestep.testing import tiny

    names = arguments.names or [*tiny.names(), *tiny.modular_names()]
    start = time.perf_counter()
    table = []
    earlier = read_rows(arguments.rows)
    for row in rows(names, arguments.seconds):
        table.append(row)
        earlier[row.name] = row
        write_rows(arguments.rows, earlier)
        figures = f"{row.outcome:<9} {row.seconds:6.2f} s  {row.calls:4} calls"
        print(f"{figures}  {row.name}  {row.reason}", flush=True)
    counts = {outcome: sum(row.outcome == outcome for row in table) for outcome in OUTCOMES}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    spent = sum(row.seconds for row in table)
    print(f"{spent:.0f} s of process time, {time.perf_counter() - start:.0f} s")
    if arguments.docs:
        arguments.docs.write_text(document(list(earlier.values())), encoding="utf-8")


if __name__ == "__main__":
    main()

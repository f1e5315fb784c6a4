"""Memory of comparing two 1 GB recordings, of recording and comparing a 3 GB trace, and of
comparing two traces of a million rows.

The first is private memory above the interpreter with torch loaded. The others are all resident
memory at its peak, mapped pages of files included; of the 3 GB trace, of a process that may use
less than the trace is large.
"""

from __future__ import annotations

import math
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from bench.common import emit

BAR_MB = 300
GIGABYTE = 250_000_000


def private_mb() -> float:
    """Anonymous memory of this process, in MB: mapped file pages do not count."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line and "-" not in line[:12])
    return int(fields["Anonymous"].split()[0]) / 1000


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Two recordings of 1 GB, 20 tensors each, that differ by noise."""
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest
    from truestep.recording.table import tensor_table

    paths = []
    for index in range(2):
        tensors = {}
        for i in range(20):
            base = torch.randn(GIGABYTE // 20, generator=torch.Generator().manual_seed(i))
            tensors[f"step/{i:04d}/cond"] = base * (1 + index * 1e-7)
        manifest = Manifest(
            tool_version="0", created="", level="full", tensors=tensor_table(tensors)
        )
        path = folder / f"{index}.safetensors"
        Recording.in_memory(tensors, manifest).save(path)
        paths.append(path)
    return paths[0], paths[1]


TRACE_BAR_MB = 1000
TRACE_FORWARDS = 24


def resident_peak_mb() -> float:
    """Largest resident memory this process has had, in MB of 1,024,000 bytes, files included."""
    from truestep.progress import resident_peak

    return (resident_peak() or 0) / 1_024_000


def trace(folder: Path, what: str) -> None:
    """Record a trace of full tensors, or compare two; both streamed."""
    torch.set_num_threads(1)
    actual, reference = folder / "actual.safetensors", folder / "reference.safetensors"
    start = time.perf_counter()
    verdict = ""
    if what == "compare":
        from truestep.replay.traces import compare_traces

        verdict = compare_traces(actual, reference).verdict.value
    else:
        from truestep import capture

        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(15)))
        path = folder / f"{what}.safetensors"
        with torch.no_grad(), capture(model, level="full", path=path):
            for step in range(TRACE_FORWARDS):
                model(torch.randn(8000, 256, generator=torch.Generator().manual_seed(step)))
    emit(
        f"trace_memory_{what}",
        trace_gb=round(reference.stat().st_size / 1e9, 2) if reference.exists() else None,
        verdict=verdict,
        seconds=round(time.perf_counter() - start, 1),
        resident_mb=round(resident_peak_mb()),
        bar_mb=TRACE_BAR_MB,
        met=resident_peak_mb() < TRACE_BAR_MB,
    )


ROWS, ROWS_BAR_MB = 1_000_000, 1500


def stats_trace(path: Path, rows: int, factor: float) -> Path:
    """A trace of 1,000 modules in as many steps as it takes; the later half is off by a factor."""
    from truestep.recording.manifest import Manifest
    from truestep.recording.spool import Blob, Spool

    spool = Spool(path, head={"tool_version": "", "created": ""}, level="stats")
    for order in range(rows):
        step, part = divmod(order, 1000)
        fqn = f"transformer_blocks.{part // 20}.attn{part % 20}.to_q"
        gain, mean = factor if part >= 500 else 1.0, math.sin(order) / 2
        moments = (0.0, gain * mean, gain * 0.9, gain * 1.2, gain * 1.1, -gain, gain)
        name = f"module/{fqn}/{step}/cond/out.0"
        fields = (name, order, "float32", (2, 3), step, "cond", fqn, 0)
        spool.add(fields, [Blob("float64", (8,), struct.pack("<8d", 6, *moments))])
    spool.close(Manifest(tool_version="", created="", level="stats"))
    return path


def rows(folder: Path, what: str) -> None:
    """Write one side of a million rows, or compare the two and tell it."""
    torch.set_num_threads(1)
    if what != "rows":
        stats_trace(folder / f"{what}.safetensors", ROWS, 1.05 if what == "rows-actual" else 1.0)
        return
    from truestep.replay.traces import compare_traces
    from truestep.report.terminal import lines

    start = time.process_time()
    sides = (folder / f"rows-{side}.safetensors" for side in ("actual", "reference"))
    result = compare_traces(*sides)
    for line in lines(result):
        print(line)
    emit(
        "compare_memory_million_rows",
        verdict=result.verdict.value,
        cpu_seconds=round(time.process_time() - start),
        resident_mb=round(resident_peak_mb()),
        bar_mb=ROWS_BAR_MB,
        met=resident_peak_mb() < ROWS_BAR_MB,
    )


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1].startswith("rows"):
        rows(Path(sys.argv[2]), sys.argv[1])
        return
    if len(sys.argv) == 3 and sys.argv[1] in ("reference", "actual", "compare"):
        trace(Path(sys.argv[2]), sys.argv[1])
        return
    if len(sys.argv) == 3:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        for what in (
            *("reference", "actual", "compare"),
            *("rows-reference", "rows-actual", "rows"),
        ):
            subprocess.run([sys.executable, "-m", "bench.bench_memory", what, folder], check=True)

    with tempfile.TemporaryDirectory() as folder:
        actual, reference = write_pair(Path(folder))
        subprocess.run(
            [sys.executable, "-m", "bench.bench_memory", str(actual), str(reference)], check=True
        )


def measure(actual: Path, reference: Path) -> None:
    """Compare the pair while another thread samples the process's memory."""
    torch.set_num_threads(1)
    torch.ones(10).sum()
    before = private_mb()
    peak, running = before, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, private_mb())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    import truestep

    start = time.perf_counter()
    result = truestep.compare(actual, reference)
    seconds = time.perf_counter() - start
    running = False
    watcher.join()
    emit(
        "compare_memory_2x1GB",
        verdict=result.verdict.value,
        seconds=round(seconds, 3),
        private_mb_above_torch=round(peak - before, 1),
        bar_mb=BAR_MB,
        met=peak - before < BAR_MB,
    )


if __name__ == "__main__":
    main()

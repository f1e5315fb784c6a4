"""The suite as other machines run it: under each instruction set, and by 1, 2 and 4 threads.

    python tests/machines.py [--sets all avx2 sse oldest] [--threads 1 2 4] [-- PYTEST ARGUMENTS]

A processor's abilities are limited by variables that libraries read as they start, so every run is
a process of its own. Exit 1 if one of them failed. Then `python -m bench.bench_machines` checks
references of one set under another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    from bench.bench_machines import SETS, available, environment

    parser = argparse.ArgumentParser(description="Run the tests as other machines do.")
    parser.add_argument("--sets", nargs="+", default=available(), choices=list(SETS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    runs = [(name, 1) for name in options.sets if 1 in options.threads]
    runs += [(options.sets[0], count) for count in options.threads if count != 1]
    results = []
    for name, threads in runs:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *options.pytest],
            cwd=ROOT,
            env={
                **environment(name),
                "TRUESTEP_TEST_THREADS": str(threads),
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            },
            check=False,
        )
        results.append((name, threads, done.returncode, time.perf_counter() - start))
    for name, threads, code, seconds in results:
        outcome = "passed" if code == 0 else f"FAILED (exit {code})"
        print(f"{name:8s} {threads} thread{'s' * (threads > 1)}  {outcome}  {seconds:.0f} s")
    return int(any(code for _, _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main())

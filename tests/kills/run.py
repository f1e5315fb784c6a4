"""`python -m tests.kills.run`: kills and races of every writer, with their counts."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.kills.harness import Count, Writer, at_random, point_by_point, race
from tests.kills.writers import RACERS, WRITERS


def main(arguments: list[str] | None = None) -> int:
    """Run them; the exit code is 1 where anything was lost, unreadable or left over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=60, help="kills at random moments, a writer")
    parser.add_argument("--every", type=int, default=1, help="kill at each so many points")
    parser.add_argument("--lines", type=int, default=5, help="interrupt at each so many lines")
    parser.add_argument("--races", type=int, default=10, help="races, a writer")
    parser.add_argument("--only", default="", help="writers whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # children are forked: there may be no pool of threads
    place = Path(tempfile.mkdtemp(prefix="truestep-kills-"))
    counts = {}
    try:
        for writer in WRITERS:
            if options.only in writer.name:
                counts[writer.name] = _one(writer, place, options)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    kills, interrupts, races = (
        sum(getattr(count, key) for count in counts.values())
        for key in ("kills", "interrupts", "races")
    )
    faults = [fault for count in counts.values() for fault in count.faults]
    print(f"{kills:,} kills, {interrupts:,} interrupts, {races} races: {len(faults)} faults")
    return 1 if faults else 0


def _one(writer: Writer, place: Path, options: argparse.Namespace) -> Count:
    count, began, folder = Count(), time.perf_counter(), place / "files"
    heavy = 1 if writer.lines else 4  # it runs a program of its own
    point_by_point(writer, folder, count, every=options.every * heavy)
    at_random(writer, folder, count, times=options.random // heavy, seed=options.seed)
    if writer.lines:
        point_by_point(writer, folder, count, every=options.lines, interrupt=True)
    if writer in RACERS:
        for number in range(options.races):
            several = 2 + (18 * number) // max(options.races - 1, 1)
            race(writer, folder, count, writers=several, seed=options.seed + number)
    print(
        f"{writer.name:<22} {count.kills:4d} kills, {count.interrupts:4d} interrupts, "
        f"{count.races:3d} races: {count.old} old, {count.new} new, {len(count.faults)} faults, "
        f"{time.perf_counter() - began:.1f} s",
        flush=True,
    )
    for fault in count.faults[:5]:
        print(f"  {fault}", flush=True)
    return count


if __name__ == "__main__":
    sys.exit(main())

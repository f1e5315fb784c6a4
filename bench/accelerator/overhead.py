"""What a recording, a check and a trace take beside a plain generation, which ends with the latent:
a tiny decoder would say nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import truestep
from bench.accelerator.families import FLUX, WAN, Family, build, usual_call
from bench.accelerator.place import Budget, Here, first_line
from bench.common import paired, ratio, rounded

Row = dict[str, Any]
ROUNDS, STEPS, DTYPE = 7, 20, "bfloat16"
FLOOR_ROUNDS = 3
"""Of a recording with a noise floor, which is a dozen runs."""

PLAIN = "plain"
TRACES: dict[str, dict[str, str]] = {
    "trace: stats, all modules": {},
    "trace: stats, blocks only": {"select": "*blocks.?"},
    "trace: sketch, all modules": {"level": "sketch"},
}
"""Options of `capture`. Full tensors of every step are written by nobody at these sizes."""


def rows(here: Here, budget: Budget) -> Iterator[Row]:
    """A row a kind of work and family."""
    families = (WAN, FLUX)
    for at, family in enumerate(families):
        part = budget.part(1 / (len(families) - at))
        if not part.allows(f"overhead on {family.name}"):
            continue
        where = {"model": family.name, "dtype": DTYPE}
        try:
            yield from ({**where, **row} for row in _of(family, here, part))
        except Exception as error:  # whatever one model raises, the other goes on
            yield {**where, "failed": first_line(error)}
        here.clear()


def _of(family: Family, here: Here, budget: Budget) -> Iterator[Row]:
    pipe = build(family, here, DTYPE)
    call = usual_call(family, here, steps=STEPS if here.real else 2) | {"output_type": "latent"}

    def plain() -> None:
        with torch.no_grad():
            pipe(**call, generator=torch.Generator().manual_seed(0))

    def traced(path: Path, **options: Any) -> None:
        with truestep.capture(pipe.transformer, path=path, **options):
            plain()

    plain()
    here.wait()
    with budget.spent("record with a noise floor"):
        recording = truestep.record(pipe, call=call)
    with tempfile.TemporaryDirectory(prefix="bench-accelerator-") as folder:
        path = Path(folder) / "trace.safetensors"
        contenders: dict[str, Callable[[], object]] = {
            PLAIN: plain,
            "record, no noise floor": partial(truestep.record, pipe, call=call, floor="none"),
            "check": partial(truestep.check, pipe, recording, call=call),
            **{name: partial(traced, path, **options) for name, options in TRACES.items()},
        }
        yield from _timed(contenders, here, budget.part(0.6))
    floor = {
        PLAIN: plain,
        "record with a noise floor": partial(truestep.record, pipe, call=call),
    }
    if budget.allows(f"timing a noise floor of {family.name}", "record with a noise floor"):
        yield from _timed(floor, here, budget.part(1.0), rounds=FLOOR_ROUNDS, warmup=0)


def _timed(
    contenders: dict[str, Callable[[], object]],
    here: Here,
    budget: Budget,
    *,
    rounds: int = ROUNDS,
    warmup: int = 1,
) -> Iterator[Row]:
    samples = paired(
        contenders,
        rounds=rounds,
        warmup=warmup,
        wait=here.wait,
        more=lambda: budget.left() > 0,
    )
    count = len(samples[PLAIN])
    if count < rounds:
        budget.cuts.append(f"{rounds - count} of {rounds} rounds of {', '.join(contenders)}")
    for name, seconds in samples.items():
        if name != PLAIN:
            yield {
                "work": name,
                "times_plain": round(ratio(samples, name, PLAIN), 3),
                "samples_s": rounded(seconds),
                "plain_s": rounded(samples[PLAIN]),
            }

"""Guidance plans on diffusers' own Wan pipeline: times beside the stock one, and sameness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import truestep
from bench.accelerator.families import WAN, build, usual_call
from bench.accelerator.place import Budget, Here, first_line
from bench.bench_guidance import PLANS
from bench.common import paired, ratio, rounded
from truestep.measure.distance import distance
from truestep.runtime.accelerate import Accelerated, accelerate

Row = dict[str, Any]
ROUNDS, STEPS, DTYPE = 9, 8, "bfloat16"
STOCK = "stock"


def rows(here: Here, budget: Budget) -> Iterator[Row]:
    """A row a plan."""
    pipe = build(WAN, here, DTYPE)
    call = {**usual_call(WAN, here, steps=STEPS if here.real else 2), "output_type": "latent"}
    done: dict[str, Accelerated] = {}
    made: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        with torch.no_grad():
            frames: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        return frames

    def planned(name: str) -> Callable[[], None]:
        def act() -> None:
            with accelerate(pipe, **PLANS[name]) as done[name]:
                made[name] = run()

        return act

    def stock() -> None:
        made[STOCK] = run()

    timing = budget.part(0.6)
    contenders = {STOCK: stock, **{name: planned(name) for name in PLANS}}
    samples = paired(contenders, rounds=ROUNDS, wait=here.wait, more=lambda: timing.left() > 0)
    rounds = len(samples[STOCK])
    if rounds < ROUNDS:
        budget.cuts.append(f"{ROUNDS - rounds} of {ROUNDS} rounds of timing")
    verdicts = _verdicts(pipe, call, budget)
    for name in PLANS:
        yield {
            "model": WAN.name,
            "dtype": DTYPE,
            "plan": name,
            "times_stock": round(ratio(samples, name, STOCK), 3),
            "rel_l2": distance(made[name], made[STOCK]).rel_l2,
            "same_bits": torch.equal(made[name], made[STOCK]),
            "batched_steps": done[name].batched,
            "fell_back": list(done[name].reasons),
            **verdicts.get(name, {"not_checked": "no time was left"}),
            "samples_s": rounded(samples[name]),
            "stock_s": rounded(samples[STOCK]),
        }


def _verdicts(pipe: Any, call: dict[str, Any], budget: Budget) -> dict[str, Row]:
    """What truestep's check says of every plan, beside a recording of the stock pipeline."""
    if not budget.allows("verdicts of truestep's check on every plan", "recording"):
        return {}
    recording = truestep.record(pipe, call=call)
    found: dict[str, Row] = {}
    for name in PLANS:
        if not budget.allows(f"verdict on {name}", "check"):
            continue
        with budget.spent("check"):
            try:
                with _under(pipe, name):
                    result = truestep.check(pipe, recording, call=call)
                found[name] = {"verdict": result.verdict.value}
                if not result.verdict.passed:
                    found[name]["sentence"] = str(result).splitlines()[0]
            except Exception as error:  # of one plan
                found[name] = {"failed": first_line(error)}
    return found


@contextmanager
def _under(pipe: Any, name: str) -> Iterator[None]:
    with accelerate(pipe, **PLANS[name]):
        yield

"""Paired timing: contenders interleaved in one process, medians of ratios, raw samples kept."""

from __future__ import annotations

import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def paired(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    wait: Callable[[], object] = lambda: None,
    more: Callable[[], bool] = lambda: True,
) -> dict[str, list[float]]:
    """Time contenders in random order within each round.

    Args:
        contenders: Name to what is timed.
        rounds: Counted rounds; each runs every contender once.
        warmup: Rounds before, not counted.
        wait: Returns when a device has done what it was given; timed with every contender.
        more: Asked before every round after the first counted one.

    Returns:
        Name to seconds, one a round; entry i of all names is from the same round.
    """
    order = list(contenders)
    dice = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    wait()
    for index in range(warmup + rounds):
        if index > warmup and not more():
            break
        dice.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            wait()
            seconds = time.perf_counter() - start
            if index >= warmup:
                samples[name].append(seconds)
    return samples


def ratio(samples: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of how many times faster `fast` was than `slow`."""
    pairs = zip(samples[slow], samples[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def emit(name: str, **fields: Any) -> None:
    """Print one result as a JSON line."""
    print(json.dumps({"bench": name, **fields}), flush=True)


def quiet() -> None:
    """Let libraries say nothing of their own insides."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()


def rounded(samples: list[float]) -> list[float]:
    """Raw samples in seconds, to microseconds."""
    return [round(sample, 6) for sample in samples]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file; a half-written last line is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows

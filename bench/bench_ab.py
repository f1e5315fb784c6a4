"""Can `truestep ab` be believed: simulated experiments on recorded runs, and live ones.

    python bench/bench_ab.py --record 600     record rounds of three equal arms (minutes)
    python bench/bench_ab.py                  simulate on them; writes bench/results/ab.md
    python bench/bench_ab.py --live 10        real A/A runs and real planted slow-downs
    python bench/bench_ab.py --ssim           SSIM against pytorch-msssim

The samples are of a real machine with other work on it: `bench/results/ab_samples.jsonl.gz`. A
simulated experiment takes a stretch of consecutive rounds from them, as they were run, with the
three equal arms renamed at random. `redrawn` also gives the arms of each round a new order.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.common import emit, paired, ratio
from truestep.experiment.records import ARMS
from truestep.experiment.statistics import (
    LEVEL,
    Interval,
    interval,
    order_of,
    paired_ratios,
)

if TYPE_CHECKING:
    import torch

    from truestep.runtime.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results"
SAMPLES = RESULTS / "ab_samples.jsonl.gz"
LIVE = RESULTS / "ab_live.jsonl"
Round = list[tuple[str, float]]
Method = Callable[[Sequence[Round], str], Interval]

EXPERIMENTS = 1000
ROUNDS = 60
SLOW_DOWN = 1.03


def record(rounds: int) -> None:
    """Record rounds of three arms that are equal: the digits model, 2 steps, decoding included."""
    from truestep.case import Case
    from truestep.experiment.arms import load_arm, run

    case = Case(
        model="builtin:digits",
        prompt="a red three moving left",
        steps=2,
        settings={"device": "cpu"},
    )
    arms = {name: load_arm(name, case, compiled=False) for name in ARMS}
    for arm in arms.values():
        run(arm, case)
    with gzip.open(SAMPLES, "wt", encoding="utf-8") as file:
        for number in range(rounds):
            for name in order_of(ARMS, seed=f"record/{number}"):
                seconds = run(arms[name], case).seconds  # type: ignore[index]
                file.write(json.dumps([number, name, round(seconds, 5)]) + "\n")


def recorded() -> list[Round]:
    """The recorded rounds: arm and seconds, in the order they ran."""
    rounds: dict[int, Round] = {}
    with gzip.open(SAMPLES, "rt", encoding="utf-8") as file:
        for line in file:
            number, arm, seconds = json.loads(line)
            rounds.setdefault(number, []).append((arm, seconds))
    return [rounds[number] for number in sorted(rounds)]


def draw(rounds: list[Round], count: int, dice: random.Random, *, redrawn: bool) -> list[Round]:
    """A stretch of consecutive rounds, with the arms renamed."""
    start = dice.randrange(len(rounds) - count + 1)
    stretch = rounds[start : start + count]
    if redrawn:
        seed = dice.random()
        orders = [order_of(ARMS, seed=f"{seed}/{i}") for i in range(count)]
        return [
            [(arm, seconds) for arm, (_, seconds) in zip(order, runs, strict=True)]
            for order, runs in zip(orders, stretch, strict=True)
        ]
    names = list(ARMS)
    dice.shuffle(names)
    renamed = dict(zip(ARMS, names, strict=True))
    return [[(renamed[arm], seconds) for arm, seconds in runs] for runs in stretch]


def slowed(rounds: list[Round], arm: str, factor: float) -> list[Round]:
    """Every run of an arm made slower."""
    return [[(a, s * factor if a == arm else s) for a, s in runs] for runs in rounds]


def cold(rounds: list[Round], arm: str, *, runs: int = 6, factor: float = 1.5) -> list[Round]:
    """The first runs of one arm made slower: half as slow again, fading out."""
    left, made = runs, []
    for found in rounds:
        row = []
        for name, seconds in found:
            if name == arm and left:
                seconds *= 1 + (factor - 1) * left / runs
                left -= 1
            row.append((name, seconds))
        made.append(row)
    return made


def drifting(rounds: list[Round], by: float) -> list[Round]:
    """A machine that gets slower evenly, by this share over the whole experiment."""
    total = sum(map(len, rounds))
    number, made = 0, []
    for found in rounds:
        row = []
        for name, seconds in found:
            row.append((name, seconds * (1 + by * number / total)))
            number += 1
        made.append(row)
    return made


def sign(rounds: Sequence[Round], arm: str) -> Interval:
    """Ours: median of the ratios of neighbouring runs, interval of the sign test."""
    return interval(paired_ratios(rounds, actual=arm, reference="baseline"))


def _logs(rounds: Sequence[Round], arm: str) -> np.ndarray:
    """Log ratio of each round's two halves, `rounds 2`."""
    ratios = paired_ratios(rounds, actual=arm, reference="baseline")
    return np.log(np.array(ratios)).reshape(-1, 2)


def _bootstrap(values: np.ndarray, center: Callable[..., np.ndarray]) -> Interval:
    """Percentile bootstrap over rounds; `values` is `rounds k`."""
    dice = np.random.default_rng(0)
    picks = dice.integers(0, len(values), size=(2000, len(values)))
    found = center(values[picks].reshape(2000, -1), axis=1)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    middle = float(center(values.reshape(1, -1), axis=1)[0])
    return Interval(math.exp(middle), math.exp(low), math.exp(high), values.size)


def boot_rounds(rounds: Sequence[Round], arm: str) -> Interval:
    """Percentile bootstrap of the median log ratio of whole rounds (ABBA blocks)."""
    return _bootstrap(_logs(rounds, arm).mean(1, keepdims=True), np.median)


def boot_halves(rounds: Sequence[Round], arm: str) -> Interval:
    """Percentile bootstrap, by rounds, of the median log ratio of neighbouring runs."""
    return _bootstrap(_logs(rounds, arm), np.median)


def boot_mean(rounds: Sequence[Round], arm: str) -> Interval:
    """Percentile bootstrap of the mean log ratio."""
    return _bootstrap(_logs(rounds, arm), np.mean)


def wilcoxon(rounds: Sequence[Round], arm: str) -> Interval:
    """Hodges-Lehmann estimate and Wilcoxon's interval (normal approximation) of whole rounds."""
    values = _logs(rounds, arm).mean(1)
    count = len(values)
    rows, columns = np.triu_indices(count)
    walsh = np.sort((values[rows] + values[columns]) / 2)
    spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    cut = max(0, math.floor(count * (count + 1) / 4 - 2.576 * spread))
    ends = (float(walsh[cut]), float(walsh[-1 - cut]))
    return Interval(math.exp(float(np.median(walsh))), *map(math.exp, ends), count)


METHODS: dict[str, Method] = {
    "sign test of neighbours (ours)": sign,
    "bootstrap, median of neighbours": boot_halves,
    "bootstrap, median of rounds": boot_rounds,
    "bootstrap, mean": boot_mean,
    "Wilcoxon of rounds": wilcoxon,
}


def called(found: Interval) -> bool:
    """Whether an interval tells two speeds apart."""
    return found.excludes_one


def simulate(experiments: int) -> list[dict[str, object]]:
    """Count, for each method and condition, the experiments that call a difference."""
    rounds = recorded()
    rows = []
    for name, method in METHODS.items():
        ours = method is sign
        for redrawn in (False, True):
            for count in (10, 30, ROUNDS):
                counts = dict.fromkeys(("aa", "slow", "faster", "cold", "drift", "wrong_way"), 0)
                widths = []
                dice = random.Random(f"{redrawn}/{count}")
                total = experiments if ours else experiments // 5
                for _ in range(total):
                    base = draw(rounds, count, dice, redrawn=redrawn)
                    found = method(base, "candidate")
                    widths.append(found.half_width)
                    counts["aa"] += called(found)
                    slow = method(slowed(base, "candidate", SLOW_DOWN), "candidate")
                    counts["slow"] += slow.low > 1
                    counts["wrong_way"] += slow.high < 1
                    fast = method(slowed(base, "candidate", 1 / SLOW_DOWN), "candidate")
                    counts["faster"] += fast.high < 1
                    counts["cold"] += called(method(cold(base, "baseline"), "candidate"))
                    counts["drift"] += called(method(drifting(base, 0.5), "candidate"))
                row = {
                    "method": name,
                    "order": "redrawn" if redrawn else "as run",
                    "rounds": count,
                    "experiments": total,
                    **{k: round(100 * v / total, 1) for k, v in counts.items()},
                    "half_width": round(float(np.median(widths)), 4),
                }
                emit("ab", **row)
                rows.append(row)
    return rows


def growing(experiments: int) -> list[dict[str, object]]:
    """`--until`: rounds are added until the half-width is small enough; does that invent any?"""
    rounds = recorded()
    rows = []
    for width in (0.03, 0.02, 0.015):
        dice = random.Random(f"until/{width}")
        counts = {"aa": 0, "slow": 0}
        used = []
        for _ in range(experiments // 5):
            base = draw(rounds, 240, dice, redrawn=True)
            for key, factor in (("aa", 1.0), ("slow", SLOW_DOWN)):
                planted = slowed(base, "candidate", factor)
                count = 10
                found = sign(planted[:count], "candidate")
                while found.half_width > width and count < len(planted):
                    count += 1
                    found = sign(planted[:count], "candidate")
                counts[key] += called(found)
                used.append(count)
        row = {
            "until": width,
            "experiments": experiments // 5,
            "rounds": int(np.median(used)),
            **{k: round(100 * v / (experiments // 5), 1) for k, v in counts.items()},
        }
        emit("ab_until", **row)
        rows.append(row)
    return rows


def ssim_speed() -> dict[str, float]:
    """Ours against pytorch-msssim on 480x832 RGB, one thread: ratio and largest difference."""
    import pytorch_msssim
    import torch

    from truestep.measure.frames import ssim_frame

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(1, 3, 60, 104, generator=generator)
    reference = torch.nn.functional.interpolate(smooth, size=(480, 832), mode="bicubic")
    reference = (reference.clamp(0, 1) * 255).round()
    worst = 0.0
    for noise in (0.5, 2.0, 8.0, 30.0):
        actual = reference + noise * torch.randn(reference.shape, generator=generator)
        actual = actual.round().clamp(0, 255)
        theirs = float(pytorch_msssim.ssim(actual, reference, data_range=255))
        worst = max(worst, abs(ssim_frame(actual[0], reference[0]) - theirs))
    samples = paired(
        {
            "pytorch-msssim": lambda: pytorch_msssim.ssim(actual, reference, data_range=255),
            "truestep": lambda: ssim_frame(actual[0], reference[0]),
        },
        rounds=25,
    )
    result = {
        "times_faster": round(ratio(samples, "pytorch-msssim", "truestep"), 2),
        "largest_difference": worst,
        "ms_a_frame": round(1000 * float(np.median(samples["truestep"])), 1),
        "ms_a_frame_msssim": round(1000 * float(np.median(samples["pytorch-msssim"])), 1),
    }
    emit("ssim", **result)
    return result


def _sleeping(seconds: float) -> Callable[[Pipeline], None]:
    """A change that makes decoding take longer."""

    def change(pipe: Pipeline) -> None:
        decode = pipe.decode

        def later(inner: Pipeline, latent: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return decode(inner, latent)

        pipe.decode = later

    return change


def live(times: int) -> list[dict[str, object]]:
    """Real experiments: nothing changed, and a planted slow-down of 3 %, 60 rounds each."""
    from truestep.case import Case
    from truestep.experiment.arms import Arm, load_arm, run

    case = Case(
        model="builtin:digits",
        prompt="a red three moving left",
        steps=2,
        settings={"device": "cpu"},
    )
    rows = []
    for planted in (0.0, SLOW_DOWN - 1):
        for number in range(times):
            arms: dict[str, Arm] = {
                name: load_arm(name, case, compiled=False) for name in ("baseline", "control")
            }
            typical = float(np.median([run(arms["baseline"], case).seconds for _ in range(9)]))
            change = _sleeping(planted * typical) if planted else None
            arms["candidate"] = load_arm("candidate", case, apply=change, compiled=False)
            for arm in arms.values():
                run(arm, case)
            rounds = [
                [(n, run(arms[n], case).seconds) for n in order_of(ARMS, seed=f"{number}/{i}")]
                for i in range(ROUNDS)
            ]
            found, control = sign(rounds, "candidate"), sign(rounds, "control")
            row = {
                "planted": planted,
                "ratio": round(found.ratio, 4),
                "low": round(found.low, 4),
                "high": round(found.high, 4),
                "called": called(found),
                "control_called": called(control),
            }
            emit("ab_live", **row)
            rows.append(row)
            with LIVE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return rows


def write(
    rows: Sequence[dict[str, object]],
    grown: Sequence[dict[str, object]],
    speeds: dict[str, float] | None,
    lived: Sequence[dict[str, object]],
) -> None:
    """Write bench/results/ab.md."""
    rounds = recorded()
    times = np.array([s for runs in rounds for _, s in runs])
    quantiles = ", ".join(f"{1000 * q:.0f}" for q in np.quantile(times, [0, 0.25, 0.5, 0.75, 1]))
    lines = [
        "# Can an A/B run be believed",
        "",
        f"{len(times)} recorded generations (builtin:digits, 2 steps, CPU) of three equal arms in "
        f"{len(rounds)} rounds on a machine with other work: {quantiles} ms (least, quartiles, "
        "most). A simulated experiment is a stretch of them with the arms renamed; `redrawn` also "
        "gives every round a new order. Stretches of 60 rounds overlap: ten are without. Intervals "
        "at 99 %. Shares are of experiments that call a "
        "difference, in per cent.",
        "",
        "A/A: nothing changed (bar: at most 5). +3 %, -3 %: the candidate's runs multiplied by "
        f"{SLOW_DOWN} or divided by it (bar: at least 90 at {ROUNDS} rounds). Cold start: nothing "
        "changed but the baseline's first 6 runs up to half as slow again (bar: at most 5). "
        "Drift: nothing changed while the machine becomes 50 % slower.",
        "",
        "| method | order | rounds | experiments | A/A | +3 % found | -3 % found | cold start | "
        "drift | half-width |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['order']} | {r['rounds']} | {r['experiments']} | {r['aa']} | "
            f"{r['slow']} | {r['faster']} | {r['cold']} | {r['drift']} | "
            f"{100 * float(str(r['half_width'])):.1f} % |"
        )
    lines += [
        "",
        "## --until",
        "",
        "Rounds are added one by one until the half-width is small enough (order redrawn).",
        "",
        "| until | experiments | median rounds | A/A | +3 % found |",
        "|---|---|---|---|---|",
    ]
    for r in grown:
        share = f"{100 * float(str(r['until'])):g} %"
        lines.append(f"| {share} | {r['experiments']} | {r['rounds']} | {r['aa']} | {r['slow']} |")
    if lived:
        lines += ["", "## Live", "", "| planted | ratio | interval | called | A/A called |"]
        lines.append("|---|---|---|---|---|")
        for r in lived:
            planted = f"{100 * float(str(r['planted'])):.0f} %"
            lines.append(
                f"| {planted} | {r['ratio']} | {r['low']} to {r['high']} | "
                f"{'yes' if r['called'] else 'no'} | {'yes' if r['control_called'] else 'no'} |"
            )
    if speeds:
        lines += [
            "",
            "## SSIM",
            "",
            f"480x832 RGB, one thread: {speeds['ms_a_frame']} ms a frame, pytorch-msssim "
            f"{speeds['ms_a_frame_msssim']} ms ({speeds['times_faster']} times faster, median of "
            f"pairs); largest difference of the two {speeds['largest_difference']:.1e}.",
        ]
    (RESULTS / "ab.md").write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=int, metavar="ROUNDS")
    parser.add_argument("--experiments", type=int, default=EXPERIMENTS)
    parser.add_argument("--live", type=int, default=0, metavar="N")
    parser.add_argument("--ssim", action="store_true")
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    if options.ssim:
        ssim_speed()
        return
    if options.live:
        live(options.live)
        return
    lived = [json.loads(line) for line in LIVE.read_text().splitlines()] if LIVE.exists() else []
    write(simulate(options.experiments), growing(options.experiments), ssim_speed(), lived)


if __name__ == "__main__":
    main()

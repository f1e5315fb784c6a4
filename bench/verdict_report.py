"""Table and plot of `bench.bench_verdict`: caught, missed, false alarms and cost, gate by gate.

python -m bench.verdict_report [--thinned] [FOLDER]
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

__all__ = [
    "NO_EFFECT",
    "Passed",
    "gates_of",
    "markdown",
    "place_of",
    "plot",
    "thinned_markdown",
    "write",
    "write_thinned",
]

NO_EFFECT = 1e-6
"""A fault whose true size in float64 is below this is reported as having none, not as missed."""

LARGE = {"float32": NO_EFFECT, "bfloat16": 1e-3}
"""True size from which a fault counts, by working precision."""

Row = dict[str, Any]
Passed = Callable[[Row], "bool | None"]
"""Whether a gate passed a run; None where it was not tried."""


def gates_of(rows: Sequence[Row]) -> dict[str, Passed]:
    """truestep's depths first, then every other gate in the rows."""
    names = dict.fromkeys(name for row in rows for name in row.get("gates", ()))

    def ours(depth: str) -> Passed:
        return lambda row: (
            None if depth not in row else row[depth]["verdict"] in ("identical", "equivalent")
        )

    def other(name: str) -> Passed:
        return lambda row: row.get("gates", {}).get(name)

    return {
        "truestep, depth steps": ours("steps"),
        "truestep, depth final": ours("final"),
        **{name: other(name) for name in names},
    }


def _effect(row: Row) -> float:
    return float(row.get("effect", 0.0))


def _tried(rows: Iterable[Row], passed: Passed) -> list[tuple[Row, bool]]:
    pairs = ((row, passed(row)) for row in rows if not row.get("not_applicable"))
    return [(row, verdict) for row, verdict in pairs if verdict is not None]


def _faults(rows: Iterable[Row], dtype: str, least: float) -> list[Row]:
    return [
        row
        for row in rows
        if row["family"] != "benign" and row["dtype"] == dtype and _effect(row) >= least
    ]


def _benign(rows: Iterable[Row], dtype: str) -> list[Row]:
    return [row for row in rows if row["family"] == "benign" and row["dtype"] == dtype]


def _share(part: int, whole: int) -> str:
    if not whole:
        return "-"
    return f"{part}/{whole}" + (f" ({part / whole:.0%})" if part < whole else "")


def markdown(rows: Sequence[Row]) -> str:
    """The whole result as Markdown."""
    gates = gates_of(rows)
    runs = [row for row in rows if not row.get("not_applicable")]
    subjects = ", ".join(dict.fromkeys(row["subject"] for row in runs))
    entries = {row["entry"]: row["family"] for row in runs}
    faults = sum(family != "benign" for family in entries.values())
    lines = [
        f"{faults} faults and {len(entries) - faults} harmless twins on {subjects}: "
        f"{len(runs):,} runs. A fault counts from a true size of 1e-6 on (in float64); the cost is "
        "the median on digits at 20 steps.",
        "",
        "| gate | float32: faults caught | float32: false alarms | bfloat16: faults of 1e-3 "
        "or more caught | bfloat16: smaller faults caught | bfloat16: false alarms | cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, passed in gates.items():
        lines.append(f"| {name} | " + " | ".join(_cells(rows, passed, name)) + " |")
    held = [row for row in rows if row["held_out"]]
    lines += ["", "The same on held-out prompts, seeds and sizes only:", "", *lines[2:4]]
    for name, passed in gates.items():
        if _tried(held, passed):
            lines.append(f"| {name} | " + " | ".join(_cells(held, passed, name)) + " |")
    none = sorted({r["entry"] for r in runs if r["family"] != "benign"} - _effective(runs))
    if none:
        lines += ["", "Without effect on any subject (true size below 1e-6): " + ", ".join(none)]
    return "\n".join([*lines, "", *_escaped(rows, gates["truestep, depth steps"])]) + "\n"


def _effective(runs: Iterable[Row]) -> set[str]:
    return {r["entry"] for r in runs if r["family"] != "benign" and _effect(r) >= NO_EFFECT}


def _cells(rows: Sequence[Row], passed: Passed, name: str) -> list[str]:
    cells = []
    for dtype in ("float32", "bfloat16"):
        groups = [_tried(_faults(rows, dtype, LARGE[dtype]), passed)]
        if dtype == "bfloat16":
            small = [r for r in _faults(rows, dtype, NO_EFFECT) if _effect(r) < LARGE[dtype]]
            groups.append(_tried(small, passed))
        for tried in groups:
            cells.append(_share(sum(not verdict for _, verdict in tried), len(tried)))
        benign = _tried(_benign(rows, dtype), passed)
        alarms = sum(not verdict for _, verdict in benign)
        cells.append(f"{alarms}/{len(benign)}" if benign else "-")
    shares = [
        row["steps"]["forwards"]
        for row in rows
        if name.endswith("steps") and row.get("steps", {}).get("forwards") and _long(row)
    ]
    cells.append(f"{statistics.median(shares):.0%} of a generation" if shares else "a generation")
    return cells


def _long(row: Row) -> bool:
    """Whether a subject takes enough steps for its cost to mean something."""
    return bool(row["subject"] == "digits")


def _escaped(rows: Sequence[Row], passed: Passed) -> list[str]:
    """What truestep itself got wrong, run by run."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        missed = [r for r, ok in _tried(_faults(rows, dtype, NO_EFFECT), passed) if ok]
        alarms = [r for r, ok in _tried(_benign(rows, dtype), passed) if not ok]
        for title, found in (("missed", missed), ("false alarms", alarms)):
            lines.append(f"truestep at depth steps, {dtype}, {title}: {len(found) or 'none'}")
            for row in sorted(found, key=_effect, reverse=True):
                ours = row["steps"]
                lines.append(
                    f"- {row['entry']} on {row['subject']}, {row['draw']}: true size "
                    f"{_effect(row):.1e}, {ours['verdict']}"
                    + (f" ({ours['tensor']}, {ours['metric']})" if ours["tensor"] else "")
                )
            lines.append("")
    return lines


WIDTH, LEFT, RIGHT, ROW = 900, 250, 20, 46
LOW, HIGH = -7.0, 1.0


def plot(rows: Sequence[Row], dtype: str) -> str:
    """SVG: a line a gate, a mark a fault at its true size (filled: caught), twins at the left."""
    gates = {n: p for n, p in gates_of(rows).items() if _tried(rows, p)}
    height = 64 + ROW * len(gates) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>Faults caught by true size, {dtype}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="15" font-weight="600" fill="#16181d">Faults by true size, '
        f"{dtype}: filled caught, hollow missed</text>",
        '<text x="10" y="40" fill="#59606c">left of the line: harmless twins, red where flagged'
        "</text>",
    ]
    bottom = 64 + ROW * len(gates)
    for power in range(-6, 2):
        x = _x(10.0**power)
        parts.append(f'<path d="M{x:.1f} 52V{bottom}" stroke="#dde0e6"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#59606c">1e{power}'
            "</text>"
        )
    divider = _x(10 ** (LOW + 0.75))
    parts.append(f'<path d="M{divider:.1f} 52V{bottom}" stroke="#59606c" stroke-width="1.5"/>')
    for index, (name, passed) in enumerate(gates.items()):
        parts += _lane(rows, dtype, name, passed, top=60 + ROW * index)
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{bottom + 31}" text-anchor="middle" fill="#59606c">'
        "true relative size of the fault (float64)</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _x(effect: float) -> float:
    power = math.log10(effect) if 0 < effect < math.inf else (HIGH if effect else LOW)
    share = (min(max(power, LOW), HIGH) - LOW) / (HIGH - LOW)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _lane(rows: Sequence[Row], dtype: str, name: str, passed: Passed, *, top: int) -> list[str]:
    tried = _tried(_faults(rows, dtype, NO_EFFECT), passed)
    benign = _tried(_benign(rows, dtype), passed)
    caught = sum(not ok for _, ok in tried)
    alarms = sum(not ok for _, ok in benign)
    parts = [
        f'<text x="10" y="{top + 16}" fill="#16181d">{escape(name)}</text>',
        f'<text x="10" y="{top + 31}" font-size="11" fill="#59606c">caught {caught}/{len(tried)}, '
        f"false alarms {alarms}/{len(benign)}</text>",
    ]
    marks = {  # one mark a place: thousands of runs overlap
        (round(_x(_effect(row)) / 3) * 3, top + 8 + (at % 4) * 8, ok)
        for at, (row, ok) in enumerate(tried)
    }
    for x, y, ok in sorted(marks, key=lambda mark: not mark[2]):
        look = 'fill="none" stroke="#b3261e"' if ok else 'fill="#2456c4" fill-opacity=".5"'
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" {look}/>')
    twins = {
        (LEFT + 4 + (at * 5) % 60, top + 8 + (at * 11) % 26, ok)
        for at, (_, ok) in enumerate(benign)
    }
    for x, y, ok in sorted(twins, key=lambda mark: not mark[2]):
        colour = "#14713d" if ok else "#b3261e"
        parts.append(f'<path d="M{x - 3} {y + 3}h6l-3 -6z" fill="{colour}"/>')
    return parts


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the runs, `verdict.md` and a plot for each precision, and print the table."""
    text = markdown(rows)
    (folder / "verdict.md").write_text(text, "utf-8")
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "verdict.jsonl.gz").write_bytes(gzip.compress(raw, mtime=0))
    for dtype in ("float32", "bfloat16"):
        if any(row["dtype"] == dtype for row in rows):
            (folder / f"verdict-{dtype}.svg").write_text(plot(rows, dtype), "utf-8")
    print(text)


# --- thinned recordings beside those that keep every step -----------------------------------------

NOT_CAUGHT = ("identical", "equivalent", "inconclusive")
PLACES = ("same", "later step", "other")


def _caught(row: Row, by: str) -> bool:
    return row[by]["verdict"] not in NOT_CAUGHT


def place_of(row: Row) -> str:
    """How the place that a thinned recording names stands to that by a whole one.

    `later step` is the same stage and pass at a kept step, where the first one is not kept and the
    result says which steps it could not judge.
    """
    whole, thin = row["steps"], row["thinned"]
    if whole["first"] == thin["first"]:
        return "same"
    alike = all(whole.get(key) == thin.get(key) for key in ("stage", "branch"))
    steps = (whole.get("step"), thin.get("step"))
    if not alike or None in steps or whole["step"] in row["kept"] or not thin["unseen"]:
        return "other"
    return "later step" if steps[0] < steps[1] else "other"


def thinned_markdown(rows: Sequence[Row]) -> str:
    """What thinned recordings judge otherwise than those that keep every step."""
    rows = [row for row in rows if "thinned" in row]
    lines = [
        "Recordings of truestep's own stages as they are made by default, beside the same with "
        f"`--keep all`: {len(rows):,} runs, no held-out draws. A fault counts where a whole "
        "recording shows it.",
        "",
        "| subject | precision | steps kept | faults caught, whole | thinned | missed, and said "
        "| missed silently | same place | later step, and said | other place "
        "| twins flagged, whole | thinned |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["subject"], row["dtype"]), []).append(row)
    lines += [_thinned_line(*key, group) for key, group in groups.items()]
    told = [text for row in rows if (text := _otherwise(row))]
    return "\n".join(
        [*lines, "", f"Otherwise than by a whole one: {len(told) or 'none'}", *told, ""]
    )


def _thinned_line(subject: str, dtype: str, rows: Sequence[Row]) -> str:
    seen = [r for r in rows if r["family"] != "benign" and _caught(r, "steps")]
    both = [row for row in seen if _caught(row, "thinned")]
    missed = [row for row in seen if not _caught(row, "thinned")]
    said = sum(bool(row["thinned"]["unseen"]) for row in missed)
    places = [place_of(row) for row in both]
    twins = [row for row in rows if row["family"] == "benign"]
    flagged = (f"{sum(_caught(r, by) for r in twins)}/{len(twins)}" for by in ("steps", "thinned"))
    kept = ", ".join(map(str, rows[0]["kept"]))
    cells = [subject, dtype, kept, len(seen), _share(len(both), len(seen)), said]
    cells += [len(missed) - said, *(places.count(place) for place in PLACES), *flagged]
    return f"| {' | '.join(map(str, cells))} |"


def _otherwise(row: Row) -> str:
    """A line on a run that a thinned recording judges otherwise, or names another place of."""
    whole, thin = row["steps"], row["thinned"]
    caught = [_caught(row, by) for by in ("steps", "thinned")]
    if caught[0] == caught[1] and (not caught[0] or place_of(row) == "same"):
        return ""
    told = [f"{one['verdict']} {one['first']}".strip() for one in (whole, thin)]
    return f"- {row['entry']} on {row['subject']}, {row['dtype']}: {told[0]}; thinned {told[1]}"


def write_thinned(rows: Sequence[Row], folder: Path) -> None:
    """Write `verdict-thinned.md` and the runs, and print the table."""
    text = thinned_markdown(rows)
    (folder / "verdict-thinned.md").write_text(text, "utf-8")
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "verdict-thinned.jsonl.gz").write_bytes(gzip.compress(raw, mtime=0))
    print(text)


def main() -> None:
    from bench.common import RESULTS, read

    words = [word for word in sys.argv[1:] if word != "--thinned"]
    folder = Path(words[0]) if words else RESULTS
    if len(words) < len(sys.argv) - 1:
        write_thinned(read(folder / "verdict-thinned.jsonl"), folder)
    else:
        write(read(folder / "verdict.jsonl"), folder)


if __name__ == "__main__":
    main()

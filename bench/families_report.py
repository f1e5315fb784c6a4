"""Table of `bench.bench_families`: what was caught, named at the right place, and alarms.

python -m bench.families_report [FOLDER]
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.verdict_report import LARGE, NO_EFFECT

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16")


def effects(rows: Sequence[Row]) -> dict[tuple[str, str, int], float]:
    """True sizes of faults, measured in float32, by subject, entry and draw."""
    return {
        (row["subject"], row["entry"], row["draw"]): float(row["effect"])
        for row in rows
        if row["dtype"] == "float32" and "effect" in row
    }


def counted(rows: Sequence[Row], dtype: str, least: float) -> list[Row]:
    """Faults of a precision whose true size is this at least; that change its bits."""
    sizes = effects(rows)
    chosen = []
    for row in rows:
        if row["dtype"] != dtype or row["kind"] != "fault" or "effect" not in row:
            continue
        size = sizes.get((row["subject"], row["entry"], row["draw"]), float(row["effect"]))
        if size >= least:
            chosen.append(row)
    return chosen


def benign(rows: Sequence[Row], dtype: str) -> list[Row]:
    """Runs of harmless twins of a precision."""
    return [
        row for row in rows if row["dtype"] == dtype and row["kind"] == "twin" and "effect" in row
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Everything as a Markdown text."""
    lines = ["# Faults and harmless twins of many families", ""]
    lines += [_summary(rows, dtype) for dtype in DTYPES if _of(rows, dtype)]
    lines += ["", _explained(rows), ""]
    lines += _families(rows)
    for title, chosen in (
        ("Not caught", _missed(rows)),
        ("Caught, another place named", _misplaced(rows)),
        ("False alarms", _alarms(rows)),
    ):
        lines += ["", f"## {title}", "", *(_listed(chosen) or ["None."])]
    lines += ["", "## Without effect", "", *_without(rows)]
    return "\n".join(lines) + "\n"


def _of(rows: Sequence[Row], dtype: str) -> list[Row]:
    return [row for row in rows if row["dtype"] == dtype]


def _summary(rows: Sequence[Row], dtype: str) -> str:
    faults = counted(rows, dtype, LARGE[dtype])
    caught = [row for row in faults if not row["passed"]]
    named = [row for row in caught if row["named"]]
    twins = benign(rows, dtype)
    alarms = [row for row in twins if not row["passed"]]
    size = f" of {LARGE[dtype]:g} or more" if LARGE[dtype] > NO_EFFECT else " with an effect"
    kinds = len({row["entry"] for row in faults})
    harmless = len({row["entry"] for row in twins})
    unsure = sum(row["sentence"].startswith("inconclusive") for row in alarms)
    return (
        f"- {dtype}: {_share(len(caught), len(faults))} runs of {kinds} faults{size} caught, "
        f"{_share(len(named), len(caught))} of them named at the right place; {len(alarms)} "
        f"alarms ({unsure} of them inconclusive) in {len(twins)} runs of {harmless} harmless twins."
    )


def _share(part: int, whole: int) -> str:
    percent = f" ({100 * part / whole:.1f}%)" if whole else ""
    return f"{part} of {whole}{percent}"


def _explained(rows: Sequence[Row]) -> str:
    return (
        "Each run builds a tiny random pipeline twice from one seed (bit-equal, or it is refused), "
        "records one with its measured noise floor, plants the entry in the other and checks it. "
        "The size of a fault is the rel_l2 of what a free run in float32 gives. The right place is "
        "declared with the fault: component, method, and the argument or output. "
        "`truestep.testing.corpus` holds all of it; `make bench-families` writes this table."
    )


def _families(rows: Sequence[Row]) -> list[str]:
    head = ["| family | precision | faults | caught | right place | harmless runs | alarms |"]
    lines = [*head, "|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["subject"] for row in rows):
        for dtype in DTYPES:
            own = [row for row in rows if row["subject"] == name]
            if not _of(own, dtype):
                continue
            faults = counted(own, dtype, LARGE[dtype])
            caught = [row for row in faults if not row["passed"]]
            named = sum(bool(row["named"]) for row in caught)
            twins = benign(own, dtype)
            alarms = sum(not row["passed"] for row in twins)
            lines.append(
                f"| {name} | {dtype} | {len(faults)} | {len(caught)} | {named} "
                f"| {len(twins)} | {alarms} |"
            )
    return lines


def _missed(rows: Sequence[Row]) -> list[Row]:
    return [r for d in DTYPES for r in counted(rows, d, LARGE[d]) if r["passed"]]


def _misplaced(rows: Sequence[Row]) -> list[Row]:
    return [r for d in DTYPES for r in counted(rows, d, LARGE[d]) if r["named"] is False]


def _alarms(rows: Sequence[Row]) -> list[Row]:
    return [row for dtype in DTYPES for row in benign(rows, dtype) if not row["passed"]]


def _listed(rows: Sequence[Row]) -> list[str]:
    return [
        f"- `{row['entry']}` on {row['subject']}, {row['dtype']}, draw {row['draw']}, size "
        f"{_number(row['effect'])}: {row['place']}; {row['sentence']}"
        for row in rows
    ]


def _number(value: Any) -> str:
    return f"{float(value):.1e}" if math.isfinite(float(value)) else str(value)


def _without(rows: Sequence[Row]) -> list[str]:
    """Faults that change nothing that counts, and entries that do not apply."""
    small = [
        f"`{row['entry']}` on {row['subject']}"
        for row in rows
        if row["kind"] == "fault" and row["dtype"] == "float32" and "effect" in row
        if float(row["effect"]) < NO_EFFECT
    ]
    absent = dict.fromkeys(
        f"`{row['entry']}` on {row['subject']}" for row in rows if "not_applicable" in row
    )
    refused = dict.fromkeys(
        f"{row['subject']} in {row['dtype']} ({row['refused']})" for row in rows if "refused" in row
    )
    return [
        f"Faults that change less than {NO_EFFECT:g}, not counted: {', '.join(small) or 'none'}.",
        "",
        f"Entries with nothing to change: {', '.join(absent) or 'none'}.",
        "",
        f"Not run, as the trusted side was refused: {', '.join(refused) or 'none'}.",
    ]


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write table and rows."""
    text = markdown(rows)
    (folder / "families.md").write_text(text, "utf-8")
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "families.jsonl.gz").write_bytes(gzip.compress(raw, mtime=0))
    print(text)


def main() -> None:
    from bench.common import RESULTS, read

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    write(read(folder / "families.jsonl"), folder)


if __name__ == "__main__":
    main()

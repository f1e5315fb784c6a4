"""Table of the corpus on models of video and sound: where each fault was seen, and in which half.

    python -m bench.bench_verdict --alone --subject tiny-ltx2 --output FOLDER --no-report
    python -m bench.ltx2_report FOLDER...

Reads every `verdict.jsonl` named by its folder and writes `results/ltx2.md`.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.common import RESULTS, read
from bench.faults.registry import BENIGN, FAULTS

__all__ = ["markdown", "misplaced"]

Row = dict[str, Any]
PASSED = ("identical", "equivalent")


def misplaced(row: Row) -> str:
    """What a row says of the place that its entry does not declare; empty where they agree."""
    entry, seen = FAULTS.get(row["entry"]), row.get("steps")
    if entry is None or not entry.stage or seen is None or seen["verdict"] in PASSED:
        return ""
    declared = {"stage": entry.stage, "branch": entry.branch, "modality": entry.modality}
    wrong = [f"{k} {v}" for k, v in declared.items() if v is not None and seen.get(k) != v]
    return "declared " + ", ".join(wrong) if wrong else ""


def markdown(rows: Sequence[Row]) -> str:
    """All runs as one table, own faults first, then the rest of the corpus and the twins."""
    lines = [*_summary(rows), ""]
    titles = {
        "Faults of video and sound": [e for e in FAULTS.values() if e.family == "joint"],
        "Faults of any model": [e for e in FAULTS.values() if e.family != "joint"],
        "Harmless twins": list(BENIGN.values()),
    }
    for title, entries in titles.items():
        order = {entry.name: at for at, entry in enumerate(entries)}
        found = [r for r in rows if r["entry"] in order and not r.get("not_applicable")]
        found.sort(key=lambda r: (order[r["entry"]], r["subject"], r["dtype"] != "float32"))
        lines += [f"### {title}", "", *_table(found), ""]
    return "\n".join(lines)


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| dtype | faults caught | at the declared place | twins flagged |",
        "|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        runs = [r for r in rows if r["dtype"] == dtype and not r.get("not_applicable")]
        faults = [r for r in runs if r["family"] != "benign"]
        caught = [r for r in faults if r["steps"]["verdict"] not in PASSED]
        declared = [r for r in caught if FAULTS[r["entry"]].stage]
        right = [r for r in declared if not misplaced(r)]
        twins = [r for r in runs if r["family"] == "benign"]
        flagged = [r for r in twins if r["steps"]["verdict"] not in PASSED]
        lines.append(
            f"| {dtype} | {len(caught)} of {len(faults)} | {len(right)} of {len(declared)} | "
            f"{len(flagged)} of {len(twins)} |"
        )
    return lines


def _table(rows: Iterable[Row]) -> list[str]:
    lines = [
        "| entry | subject | dtype | verdict | stage | step | branch | modality | x floor | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seen = row["steps"]
        ratio = seen.get("ratio")
        cells = [
            f"`{row['entry']}`",
            row["subject"],
            row["dtype"],
            seen["verdict"],
            *(str(seen[k]) if seen.get(k) is not None else "" for k in ("stage", "step")),
            *(seen.get(k) or "" for k in ("branch", "modality")),
            f"{float(ratio):.3g}" if ratio is not None else "",
            misplaced(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    kept: dict[tuple[str, ...], Row] = {}
    for folder in sys.argv[1:]:
        for row in read(Path(folder) / "verdict.jsonl"):
            kept[row["subject"], row["dtype"], row["entry"]] = row
    rows = list(kept.values())
    text = markdown(rows)
    (RESULTS / "ltx2.md").write_text(text, "utf-8")
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (RESULTS / "ltx2.jsonl.gz").write_bytes(gzip.compress(raw, mtime=0))
    print(text)


if __name__ == "__main__":
    main()

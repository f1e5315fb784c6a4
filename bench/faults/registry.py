"""All entries of the corpus; `python -m bench.faults.registry` writes the table of its README."""

from __future__ import annotations

import importlib
from pathlib import Path

from bench.faults.entry import FAMILIES, Change, Fault, NotApplicable, benign, fault

__all__ = [
    "BENIGN",
    "FAMILIES",
    "FAULTS",
    "Change",
    "Fault",
    "NotApplicable",
    "benign",
    "fault",
    "table",
]

README = Path(__file__).with_name("README.md")
START, END = "<!-- table: python -m bench.faults.registry -->", "<!-- end of table -->"


def _entries(name: str) -> list[Fault]:
    """Entries of one module, in the order of their definitions."""
    module = importlib.import_module(f"bench.faults.{name}")
    marked = (getattr(value, "entry", None) for value in vars(module).values())
    return [entry for entry in marked if isinstance(entry, Fault)]


_ALL = [entry for name in FAMILIES for entry in _entries(name)]

FAULTS: dict[str, Fault] = {entry.name: entry for entry in _ALL if entry.family != "benign"}
"""Planted bugs by name."""

BENIGN: dict[str, Fault] = {entry.name: entry for entry in _ALL if entry.family == "benign"}
"""Harmless changes by name."""


def table() -> str:
    """All entries as Markdown tables, one a family."""
    lines = []
    for family in FAMILIES:
        entries = [e for e in (*FAULTS.values(), *BENIGN.values()) if e.family == family]
        last = "why it is harmless" if family == "benign" else "source"
        lines += [f"### {family} ({len(entries)})", ""]
        lines += [
            f"| function | what it does | acts on | subjects | {last} |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(entry) for entry in entries]
        lines.append("")
    return "\n".join(lines)


def _row(entry: Fault) -> str:
    source = entry.source
    if source.startswith("https://github.com/"):
        short = source.removeprefix("https://github.com/")
        source = f"[{short}]({source})"
    where = f"{entry.apply.__module__.rpartition('.')[2]}.py:{entry.apply.__name__}"
    note = entry.note.removeprefix("Bug: ") + (" (slow)" if entry.slow else "")
    subjects = ", ".join(sorted(entry.subjects, reverse=True))
    return f"| `{where}` | {note} | {entry.acts} | {subjects} | {source} |"


def updated(text: str) -> str:
    """The README's text with the table of now."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write the table into the README."""
    README.write_text(updated(README.read_text("utf-8")), "utf-8")
    print(f"{len(FAULTS)} faults, {len(BENIGN)} harmless twins: {README.name}")


if __name__ == "__main__":
    main()

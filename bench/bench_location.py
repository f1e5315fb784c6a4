"""Where it broke: is the module that a check names the one in which the fault was planted?

Every fault that acts inside a model is planted in diffusers' transformer and, again, in a port with
other names and fused tensors; `check --depth modules` then names a module. Places are declared with
the faults (`bench/faults`). Rows are appended as they are done, and not done again.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, read
from bench.faults.draws import DRAWS
from bench.faults.entry import FAMILIES, Fault, NotApplicable
from bench.faults.places import places
from bench.faults.port import PORTED, WITHOUT
from bench.faults.registry import BENIGN, FAULTS
from bench.faults.subjects import Wan, subjects
from examples.parity.wan_port.port import use
from truestep.judge.divergence import parent
from truestep.pairing.naming import ROOT
from truestep.pairing.partners import partners_of
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.isolation import flow
from truestep.replay.levels import Known
from truestep.replay.locating import Place, drill_stage, locate_module, prediction
from truestep.replay.record import record_pipeline
from truestep.verdict import Verdict

SUBJECTS = ("tiny-wan2.1", "tiny-wan2.2-5b", "tiny-wan2.2", "digits")
SAME, RENAMED = "same names", "renamed, fused"
PORTS = (SAME, RENAMED)
EXACT, PARENT, WRONG, UNNAMED = "exact", "parent", "wrong", "not named"
OUTCOMES = (EXACT, PARENT, WRONG, UNNAMED)
NO_EFFECT = "without effect"


def main() -> None:
    """Fill `location.jsonl` and write `location.md`."""
    options = _options()
    torch.set_num_threads(1)
    path = options.output / "location.jsonl"
    rows = read(path)  # of this machine: the packed ones beside it were measured on another
    done = {_key(row) for row in rows}
    for name in options.subject or SUBJECTS:
        for dtype in options.dtype or ("float32",):
            bench = None
            for port in options.port or PORTS:
                for entry in _entries(port, options.entry):
                    if (name, dtype, port, entry.name) in done:
                        continue
                    bench = bench or Bench.of(name, dtype)
                    row = bench.run(entry, port)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(_line(row), file=sys.stderr, flush=True)
                    gc.collect()
    (options.output / "location.md").write_text(report(read(path)), "utf-8")
    packed = gzip.compress(path.read_bytes(), mtime=0)
    (options.output / "location.jsonl.gz").write_bytes(packed)


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Is the module that is named the one that broke?")
    parser.add_argument("--subject", action="append", default=[], choices=SUBJECTS)
    parser.add_argument("--dtype", action="append", default=[], choices=["float32", "bfloat16"])
    parser.add_argument("--port", action="append", default=[], choices=PORTS)
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("subject", "dtype", "port", "entry"))


def _entries(port: str, names: Iterable[str]) -> Iterator[Fault]:
    """Entries for one kind of candidate; those that act inside a model, and the harmless ones."""
    if port == SAME:
        inside = [entry for entry in FAULTS.values() if entry.where]
        found = [*inside, *BENIGN.values()]
    else:
        found = [*PORTED.values(), UNCHANGED_PORT]
    for entry in found:
        if (not names or entry.name in names) and "wan" in entry.subjects and not entry.slow:
            yield entry


UNCHANGED_PORT = Fault(
    name="port-unchanged",
    family="benign",
    acts="transformer",
    source="the same model, written again",
    apply=use,
    subjects=frozenset({"wan"}),
)


@dataclass
class Bench:
    """One subject in one precision, recorded once; what its trusted model measures is kept."""

    subject: Wan
    dtype: str
    trusted: Any
    recording: Recording
    order: list[str]
    kept: dict[tuple[str, Place], Known] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, dtype: str) -> Bench:
        """Load and record a subject."""
        (subject,) = subjects((name,))
        assert isinstance(subject, Wan)
        trusted = subject.load(DRAWS[0], dtype)
        recording = record_pipeline(trusted, case=subject.case(DRAWS[0], dtype))
        trusted = subject.load(DRAWS[0], dtype)
        forward = prediction(trusted, Place("prediction", 0, "cond"), recording)
        ran = flow(trusted.expert(1), forward, place=(0, "cond"))
        return cls(subject, dtype, trusted, recording, ran.calls)

    def run(self, entry: Fault, port: str) -> dict[str, Any]:
        """Check one candidate down to the module, and judge the answer."""
        start = time.perf_counter()
        row: dict[str, Any] = {
            "subject": self.subject.name,
            "dtype": self.dtype,
            "port": port,
            "entry": entry.name,
            "family": entry.family,
        }
        with globals_restored():
            row.update(self._located(entry, port))
        return {**row, "seconds": round(time.perf_counter() - start, 2)}

    def _located(self, entry: Fault, port: str) -> dict[str, Any]:
        torch.manual_seed(0)
        try:
            pipe = self.subject.load(DRAWS[0], self.dtype)
            pipe = entry.apply(pipe) or pipe
        except NotApplicable as error:
            return {"outcome": "not applicable", "note": str(error)}
        case = self.subject.case(DRAWS[0], self.dtype)
        checked = check_pipeline(pipe, self.recording, case=case)
        row: dict[str, Any] = {"verdict": checked.verdict.value}
        if not checked.verdict.passed:
            checked = locate_module(
                pipe, self.trusted, self.recording, checked, known=self._known(port)
            )
        found = checked.first_divergence
        named = found.fqn if found is not None else None
        row |= {"named": named, "kind": found.kind if found is not None and named else None}
        if entry.family == "benign":
            drilled = self._drilled(pipe, port)
            row["drilled"] = drilled
            return {**row, "outcome": "named" if named else "none named"}
        model = getattr(self.trusted, entry.model)
        wanted = places(entry.where, model)
        row["where"] = list(entry.where)
        if checked.verdict is Verdict.IDENTICAL:
            return {**row, "outcome": NO_EFFECT}
        row |= {"earlier": self._earlier(named, wanted), "notes": list(checked.notes)}
        return {**row, "outcome": outcome(named, wanted)}

    def _earlier(self, named: str | None, wanted: set[str]) -> list[str]:
        """Declared modules of the transformer that run before the one that is named."""
        if named not in self.order:
            return []
        before = [name for name in self.order[: self.order.index(named)] if name in wanted]
        return [name for name in before if name != ROOT and not named.startswith(f"{name}.")]

    def _drilled(self, pipe: Any, port: str) -> str | None:
        """What is named if the transformer is opened although the check has no reason to."""
        place = Place("prediction", 0, "cond")
        partners = partners_of(pipe.expert(1), self.trusted.expert(1))
        found = drill_stage(
            pipe,
            self.trusted,
            self.recording,
            place,
            partners=partners,
            known=self._known(port)(place),
        )
        return found.divergence.fqn if found.divergence is not None else None

    def _known(self, port: str) -> Callable[[Place], Known]:
        return lambda place: self.kept.setdefault((port, place), {})


def outcome(named: str | None, wanted: set[str]) -> str:
    """How good an answer is: a declared module, one around a declared module, another, or none."""
    if not named:
        return UNNAMED
    if named in wanted:
        return EXACT
    around = {name for inside in wanted for name in _around(inside)}
    return PARENT if named in around else WRONG


def _around(fqn: str) -> set[str]:
    """The modules around one; the model itself only of what stands directly in it."""
    found = {parent(fqn)}
    while (more := {parent(name) for name in found if name != ROOT} - {ROOT}) - found:
        found |= more
    return found


@contextmanager
def globals_restored() -> Iterator[None]:
    """Undo what a harmless twin may set for the whole process."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)


def report(rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    faults = [row for row in rows if row["outcome"] in OUTCOMES]
    inside = [row for row in faults if FAULTS[row["entry"]].model == "transformer"]
    lines = [
        "# Where it broke",
        "",
        f"{_share(inside)} faults inside the transformer were named at the exact module, on the "
        f"same names {_share(r for r in inside if r['port'] == SAME)}, on the renamed and fused "
        f"port {_share(r for r in inside if r['port'] == RENAMED)}. A fault counts once for every "
        "model and precision it was planted in; an answer is exact if it is among the modules "
        "declared with the fault.",
        "",
        "| family | port | faults | exact module | parent block | wrong module | not named |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for port in PORTS:
            own = [row for row in faults if row["family"] == family and row["port"] == port]
            if own:
                counts = Counter(row["outcome"] for row in own)
                cells = " | ".join(str(counts[name]) for name in OUTCOMES)
                lines.append(f"| {family} | {port} | {len(own)} | {cells} |")
    late = [row for row in faults if row["outcome"] == EXACT and row.get("earlier")]
    lines += [
        "",
        f"Of faults in several modules, the first that runs was named in all but {len(late)} exact "
        "answers.",
        *(f"- `{r['entry']}`, {_place(r)}: `{r['named']}` after `{r['earlier'][0]}`" for r in late),
        "",
        "## Without a fault",
        "",
        "A model is opened where a check fails. The last column is of models opened all the same, "
        "where twins that compute something in another way inside (positions one further) may be "
        "named for it.",
        "",
        "| | runs | none named | none named if opened all the same |",
        "|---|---|---|---|",
    ]
    for port in PORTS:
        own = [row for row in rows if row["family"] == "benign" and row["port"] == port]
        own = [row for row in own if row["outcome"] != "not applicable"]
        none = sum(row["outcome"] == "none named" for row in own)
        what = "harmless twins" if port == SAME else "the unchanged port"
        opened = sum(row["drilled"] is None for row in own)
        lines.append(f"| {what} | {len(own)} | {none} | {opened} |")
    silent = [row for row in rows if row["outcome"] == NO_EFFECT]
    lines += ["", "## Misses", "", *_misses(rows)]
    lines += ["", "## Without effect", ""]
    lines += [
        f"{len(silent)} runs of a fault changed no bit of what a check looks at, and are not "
        "counted above:",
        "",
        *(f"- `{row['entry']}`: {_place(row)}" for row in silent),
    ]
    if WITHOUT:
        lines += ["", "Faults without a meaning in the port:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in WITHOUT.items()]
    lines += ["", "## Every run", "", "<details><summary>All rows</summary>", ""]
    lines += ["| fault | model | port | outcome | named | kind |", "|---|---|---|---|---|---|"]
    for row in sorted(faults, key=lambda r: (r["family"], r["entry"], r["port"], r["subject"])):
        model = f"{row['subject']} {row['dtype']}"
        texts = (row["entry"], model, row["port"], row["outcome"], row["named"], row["kind"])
        lines.append("| " + " | ".join(str(text or "") for text in texts) + " |")
    return "\n".join([*lines, "", "</details>", ""])


def _misses(rows: list[dict[str, Any]]) -> list[str]:
    """Every answer that is not exact, and every name given without a fault."""
    made = []
    for row in rows:
        if row["outcome"] == "named" or (row["outcome"] in OUTCOMES and row["outcome"] != EXACT):
            wanted = ", ".join(f"`{glob}`" for glob in row.get("where", ())) or "nothing"
            named = f"`{row['named']}`" if row["named"] else "nothing"
            kind = f" ({row['kind']})" if row["kind"] else ""
            made.append(
                f"- `{row['entry']}`, {_place(row)}: {named}{kind} instead of {wanted}: "
                f"{row['outcome']}"
            )
    return made or ["None."]


def _place(row: dict[str, Any]) -> str:
    return f"{row['subject']} in {row['dtype']}, {row['port']}"


def _share(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    exact = sum(row["outcome"] == EXACT for row in rows)
    return f"{exact} of {len(rows)} ({exact / max(len(rows), 1):.1%})"


def _line(row: dict[str, Any]) -> str:
    head = f"{row['subject']:15s} {row['dtype']:8s} {row['port']:14s} {row['entry']:34s}"
    text = f"{head} {row['outcome']:14s}"
    return f"{text} {row.get('named') or '-'}: {row.get('kind') or '-'} {row['seconds']}s"


if __name__ == "__main__":
    main()

"""The ledger `parity.toml` beside the tests: evidence of every component, and how it is shown.

The file keeps evidence. A state in it is for the reader; the one that is reported is derived from
the evidence again each time, and `expired` where the world has moved on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from truestep.errors import FileFormatError
from truestep.files import alone, write_text
from truestep.parity import tomlfile
from truestep.parity.evidence import Evidence, State, expiry, state_of
from truestep.verdict import Record

LEDGER = "parity.toml"
LEDGER_VERSION = 1
_HEADER = (
    "# Written by `truestep parity run`. Only notes and escape_hatch are for people to edit:\n"
    "# a status is derived from its evidence whenever it is shown.\n\n"
)


class Component(Record):
    """One component's last run."""

    family: str
    component: str
    kind: str
    test: str
    coverage_scope: str
    status: str = ""
    concerns: tuple[str, ...] = ()
    official_definition_files: tuple[str, ...] = ()
    official_instantiation_files: tuple[str, ...] = ()
    digest: str = ""
    evidence: Evidence

    @property
    def key(self) -> tuple[str, str]:
        """What a ledger holds once."""
        return self.family, self.component


class Ledger(Record):
    """Everything in one folder."""

    version: int = LEDGER_VERSION
    notes: str = ""
    escape_hatch: str = ""
    component: tuple[Component, ...] = ()


class Status(Record):
    """One component as it stands now."""

    family: str
    component: str
    kind: str
    test: str
    status: str
    state: str
    reason: str
    missing: str
    expired: tuple[str, ...]
    coverage_scope: str
    official_definition_files: tuple[str, ...]
    official_instantiation_files: tuple[str, ...]
    concerns: tuple[str, ...]
    evidence: Evidence

    @property
    def proven(self) -> bool:
        """Whether it is `non_skip_pass`, and not expired."""
        return self.state == State.NON_SKIP_PASS and not self.expired


class Block(Record):
    """The status block of one ledger."""

    path: str
    components: tuple[Status, ...]
    pipeline_parity: tuple[Status, ...] = Field(
        default=(), description="cases of kind pipeline: denoised latents, decoded frames"
    )
    notes: str = ""
    escape_hatch: str = ""
    handed_over: bool = Field(
        default=False,
        description="every component and pipeline is proven, a production loader covered somewhere",
    )

    @property
    def everything(self) -> tuple[Status, ...]:
        """Components and pipelines."""
        return (*self.components, *self.pipeline_parity)


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a folder; an absent one is empty.

    Raises:
        FileFormatError: It is damaged, or of a newer version.
    """
    path = folder / LEDGER
    if not path.exists():
        return Ledger()
    data = tomlfile.read(path, "the parity ledger")
    if isinstance(data.get("version"), int) and data["version"] > LEDGER_VERSION:
        raise FileFormatError(
            "the parity ledger was written by a newer truestep",
            where=str(path),
            measured=f"version {data['version']}; this truestep reads up to {LEDGER_VERSION}",
            hint="pip install --upgrade truestep",
        )
    try:
        return Ledger.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise FileFormatError(
            "the parity ledger is damaged",
            where=f"{path}: {'.'.join(str(part) for part in first['loc'])}",
            measured=first["msg"],
            hint=f"git checkout {path}  # or delete it and run the parity tests again",
        ) from None


def update_ledger(folder: Path, runs: Iterable[Component], today: date) -> Path:
    """Put runs into a folder's ledger, each in place of its component's last one.

    Raises:
        FileFormatError: The ledger cannot be read.
        WriteError: It cannot be written.
    """
    path = folder / LEDGER
    with alone(folder, "the parity ledger"):
        ledger = read_ledger(folder)
        merged = {entry.key: entry for entry in ledger.component}
        for run in runs:
            merged[run.key] = run.model_copy(
                update={
                    "status": state_of(run.evidence, today)[0].value,
                    "digest": run.evidence.digest,
                }
            )
        entries = tuple(merged[key] for key in sorted(merged))
        kept = ledger.model_copy(update={"component": entries})
        write_text(path, _HEADER + tomlfile.dumps(_plain(kept)), "the parity ledger")
    return path


def _plain(ledger: Ledger) -> dict[str, Any]:
    return ledger.model_dump(mode="json", exclude_none=True)


def status_of(
    entry: Component, root: Path, environment: Mapping[str, str] | None, today: date
) -> Status:
    """A component as its evidence and the present world have it."""
    state, reason = state_of(entry.evidence, today)
    expired = expiry(entry.evidence, root, environment)
    if entry.digest != entry.evidence.digest:
        expired = ("the evidence was edited", *expired)
    part = entry.evidence.missing
    return Status(
        **entry.model_dump(exclude={"status", "digest", "evidence"}),
        status=f"expired: {'; '.join(expired)}" if expired else state.value,
        state=state.value,
        reason=reason,
        missing=f"{part.kind}: {part.what}" if part else "",
        expired=expired,
        evidence=entry.evidence,
    )


def block_of(folder: Path, environment: Mapping[str, str] | None, today: date) -> Block:
    """The status block of a folder's ledger.

    Args:
        folder: Holds `parity.toml`.
        environment: The present one, as `evidence.relevant` cuts it; None leaves it unchecked.
        today: The date by which tolerances expire.
    """
    ledger = read_ledger(folder)
    found = [status_of(entry, folder, environment, today) for entry in ledger.component]
    components = tuple(item for item in found if item.kind != "pipeline")
    loaders = [item for item in components if item.coverage_scope in ("production_loader", "both")]
    return Block(
        path=(folder / LEDGER).as_posix(),
        components=components,
        pipeline_parity=tuple(item for item in found if item.kind == "pipeline"),
        notes=ledger.notes,
        escape_hatch=ledger.escape_hatch,
        handed_over=bool(components) and all(item.proven for item in found) and bool(loaders),
    )


def markdown(blocks: Sequence[Block]) -> str:
    """Status blocks as Markdown."""
    lines: list[str] = []
    for block in blocks:
        families = sorted({item.family for item in block.everything})
        for family in families:
            lines += [f"## Parity of {family}", ""]
            own = [item for item in block.components if item.family == family]
            for item in own:
                lines += _markdown_item(item)
            whole = [item for item in block.pipeline_parity if item.family == family]
            for item in whole:
                lines += [f"- **pipeline_parity** ({item.component})"]
                lines += [f"  - test: `{item.test}`", f"  - status: `{item.status}`"]
                lines += _markdown_evidence(item)
            lines += [] if whole else ["- **pipeline_parity**: no test"]
            lines.append("")
        lines += [f"- notes: {block.notes or 'none'}"]
        lines += [f"- escape hatch: {block.escape_hatch or 'none'}"]
        lines += [f"- handed over: {'yes' if block.handed_over else 'no'}", ""]
    return "\n".join(lines).strip() + "\n"


def _markdown_item(item: Status) -> list[str]:
    listed = {
        "official_definition_files": item.official_definition_files,
        "official_instantiation_files": item.official_instantiation_files,
        "concerns": item.concerns,
    }
    lines = [
        f"- **{item.component}** ({item.kind})",
        f"  - test: `{item.test}`",
        f"  - status: `{item.status}`",
    ]
    lines += [f"  - missing: {item.missing or 'nothing'}"]
    lines += [f"  - coverage_scope: `{item.coverage_scope}`"]
    for name, values in listed.items():
        lines += [f"  - {name}: {', '.join(values) or 'none'}"]
    return lines + _markdown_evidence(item)


def _markdown_evidence(item: Status) -> list[str]:
    """Why it is no better, and what was measured."""
    lines = [f"  - reason: {item.reason}"] if item.reason else []
    if item.evidence.numbers is not None and item.evidence.numbers.rel_l2 is not None:
        lines += [f"  - measured: {measured(item.evidence)} ({item.evidence.date})"]
    return lines


def measured(evidence: Evidence) -> str:
    """The numbers of a run in a few words."""
    numbers = evidence.numbers
    if numbers is None or numbers.rel_l2 is None:
        return "nothing"
    text = f"rel_l2 {numbers.rel_l2:.1e}"
    if numbers.ratio is not None:
        word = "the noise floor" if numbers.floor_source == "measured" else numbers.floor_source
        text += f", {times(numbers.ratio)} x {word or 'the floor'}"
    text += f", {plural(numbers.tensors, 'tensor')} of {plural(numbers.samples, 'sample')}"
    seen = evidence.frames
    if seen is not None:
        text += f"; {plural(seen.count, 'frame')}, PSNR {seen.psnr_db:.0f} dB"
        text += f", SSIM {seen.ssim:.4f}" if seen.ssim is not None else ""
    return text


def times(ratio: float) -> str:
    """A ratio as a person says it: `1.1`, `26`, `30,200`."""
    if not math.isfinite(ratio):
        return str(ratio)
    if ratio < 10:
        return f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.1g}"
    digits = 2 - math.floor(math.log10(ratio))
    return f"{round(ratio, min(digits, 0)):,.0f}"


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `3 tensors`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"

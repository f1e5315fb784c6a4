"""What belongs to what in two implementations, with the evidence of every pair."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Literal

from pydantic import Field

from truestep.verdict import Float, Record

Kind = Literal["parameter", "module"]


class Evidence(str, Enum):
    """Why two names are a pair, strongest first within parameters and within modules."""

    NAME = "same name"
    RENAME = "rename map"
    EQUAL = "equal"
    TRANSPOSED = "transposed"
    RESHAPED = "reshaped"
    FUSED = "fused"
    PRECISION = "precision"
    SCALED = "scaled"
    STRUCTURE = "structure"
    EXCLUSION = "by exclusion"
    PARAMETERS = "parameters"
    CONTAINER = "container"
    POSITION = "position"
    ACTIVATION = "activation"

    __str__ = str.__str__


class Pair(Record):
    """Names that belong together; several on one side where the other side has them fused.

    Attributes:
        parts: One a name of the side with several: where it is in the other side's tensor.
        layout: How the reference becomes the actual side, empty where the layouts agree.
        rel_l2: Distance of the two in one layout; None for modules without parameters.
        scale: Factor from the reference to the actual side.
        odd: The pair disagrees with its content or with pairs of its kind; `note` says how.
    """

    kind: Kind
    actual: tuple[str, ...]
    reference: tuple[str, ...]
    evidence: Evidence
    parts: tuple[str, ...] = ()
    layout: str = ""
    rel_l2: Float | None = None
    scale: Float = 1.0
    odd: bool = False
    note: str = ""

    def text(self) -> str:
        """The evidence with its numbers, as the table shows it."""
        words = [str(self.evidence)]
        if self.evidence is Evidence.EXCLUSION:
            words[0] += ", content differs"
        if self.rel_l2:
            words[0] += f": rel_l2 {self.rel_l2:.2g}"
        words += [f"x {self.scale:.6g}"] if self.scale != 1.0 else []
        words += [self.layout] if self.layout else []
        words += [self.note] if self.note else []
        return "; ".join(words)


class Ambiguous(Record):
    """Names of which any could belong to any: nothing decides, so none is paired."""

    kind: Kind
    actual: tuple[str, ...]
    reference: tuple[str, ...]
    why: str


class Pairing(Record):
    """Pairs of parameters and modules of two implementations, and what is left over."""

    schema_version: int = 1
    pairs: tuple[Pair, ...] = ()
    ambiguous: tuple[Ambiguous, ...] = ()
    unmatched_actual: tuple[str, ...] = Field(default=(), description="parameters, then modules")
    unmatched_reference: tuple[str, ...] = ()

    def of(self, kind: Kind) -> tuple[Pair, ...]:
        """Pairs of parameters, or of modules."""
        return tuple(pair for pair in self.pairs if pair.kind == kind)

    @property
    def odd(self) -> tuple[Pair, ...]:
        """Pairs of parameters that disagree with their content or with others of their kind."""
        return tuple(pair for pair in self.pairs if pair.odd and pair.kind == "parameter")

    @property
    def complete(self) -> bool:
        """Whether nothing is left over and nothing is ambiguous."""
        return not (self.ambiguous or self.unmatched_actual or self.unmatched_reference)

    def rename(self) -> dict[str, str]:
        """Modules of the actual side to the one module of the reference with the same output."""
        named: dict[str, str] = {}
        for pair in self.of("module"):
            if pair.evidence is Evidence.CONTAINER or pair.parts:
                continue
            same = pair.evidence is Evidence.ACTIVATION  # several that return the same: any does
            if same or len(pair.actual) == len(pair.reference) == 1:
                for name in pair.actual:
                    named.setdefault(name, pair.reference[0])
        return named

    def sentence(self) -> str:
        """What a person would repeat."""
        counts = [f"{len(self.of(kind))} {kind}s" for kind in ("parameter", "module")]
        text = f"paired {' and '.join(counts)}"
        odd = len(self.odd)
        text += f", {odd} odd" if odd else ""
        ambiguous = sum(len(group.actual) for group in self.ambiguous)
        left = (len(self.unmatched_actual), len(self.unmatched_reference))
        return f"{text}; {ambiguous} ambiguous; unmatched: {left[0]} actual, {left[1]} reference"

    def table(self) -> str:
        """Aligned text: odd pairs first, then all others, then what is left over."""
        ordered = sorted(self.pairs, key=lambda pair: not pair.odd)
        rows = [("", "actual", "reference", "evidence")]
        rows += [
            ("ODD" if pair.odd else "", _names(pair, 0), _names(pair, 1), pair.text())
            for pair in ordered
        ]
        for group in self.ambiguous:
            names = (", ".join(group.actual), ", ".join(group.reference))
            rows.append(("?", *names, f"ambiguous: {group.why}"))
        rows += [("-", name, "", "unmatched") for name in self.unmatched_actual]
        rows += [("-", "", name, "unmatched") for name in self.unmatched_reference]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = (
            "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip()
            for row in rows
        )
        return "\n".join([*lines, self.sentence()])

    def write(self, path: str) -> None:
        """Write the rename map as TOML; see `truestep.pairing.files`."""
        from truestep.pairing import files

        modules = [(pair.actual, pair.reference) for pair in self.of("module")]
        several = [sides for sides in modules if max(map(len, sides)) > 1]
        files.write(path, self.rename(), several)

    @staticmethod
    def read(path: str) -> dict[str, str]:
        """Read a rename map; see `truestep.pairing.files`."""
        from truestep.pairing import files

        return files.read(path)


def _names(pair: Pair, side: int) -> str:
    """Names of one side, with the places of fused parts."""
    names: Iterable[str] = (pair.actual, pair.reference)[side] or ("",)
    if pair.parts and len(pair.parts) == len(tuple(names)) and len(pair.parts) > 1:
        names = (f"{name} -> {place}" for name, place in zip(names, pair.parts, strict=True))
    return ", ".join(name or "(model)" for name in names)

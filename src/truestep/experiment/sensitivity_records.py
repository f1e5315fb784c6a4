"""What `truestep sensitivity` finds out: which layers a change costs most in. Pure: no I/O."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from truestep.records import Float, Record
from truestep.verdict import SCHEMA_VERSION


class LayerSensitivity(Record):
    """What a change of one layer alone costs.

    Attributes:
        name: Of the layer, its model before it.
        bytes: Of its weight, as it is kept in high precision.
        errors: Of the guided prediction at each step that was looked at, relative to it.
        score: Of the final latent, relative to it.
        exact: Whether the score was measured with this layer changed, not estimated.
        kept: Whether it is on the list.
    """

    name: str
    bytes: int
    errors: tuple[Float, ...]
    score: Float
    exact: bool = False
    kept: bool = False


class MeasuredError(Record):
    """What a change with some layers left out was measured to cost, by running it.

    Attributes:
        predictions: Of the guided prediction at each step that was looked at, rel_l2.
        final: Of the latent that a free run ends in. frames: of what is decoded from it.
    """

    predictions: tuple[Float, ...]
    final: Float
    frames: Float


class Sensitivity(Record):
    """Result of `truestep sensitivity CASE --change CHANGE`.

    Attributes:
        change: What it was asked for.
        steps: Those looked at.
        gains: Of each, how far the end moves for an error of its prediction.
        layers: The most sensitive first.
        budget: Share of the bytes of all layers that may be kept.
        kept: Names, the most sensitive first. kept_bytes, total_bytes: of them, and of all layers.
        nothing_kept, list_kept: What the change costs, by running it.
        method: `estimate`: by random probes of the prediction's derivative; `exact`: each layer
            changed on its own.
        forwards: That all of it took. forwards_generation: of one generation.
        left_out: What the change does that is not of these layers.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    sentence: str
    case_id: str
    case: dict[str, Any]
    change: str
    steps: tuple[int, ...]
    gains: tuple[Float, ...]
    layers: tuple[LayerSensitivity, ...]
    budget: Float
    kept: tuple[str, ...]
    kept_bytes: int
    total_bytes: int
    nothing_kept: MeasuredError
    list_kept: MeasuredError
    method: Literal["estimate", "exact"]
    probes: int = 0
    forwards: int = Field(description="transformer forwards; a backward counts as two")
    forwards_generation: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    repeat: str = ""

    @property
    def exit_code(self) -> int:
        """0 where the list makes the end nearer, as it was run; else 4: it says nothing."""
        return 0 if self.list_kept.final < self.nothing_kept.final else 4

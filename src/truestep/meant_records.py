"""What is said of a change that is meant to move the model. Pure: no I/O, no torch."""

from __future__ import annotations

from typing import Literal

from truestep.records import Float, Record


class MeantFault(Record):
    """A weight, or a module, that is further off than its declared change explains.

    Attributes:
        module: Its fqn, with the model before it: `transformer.blocks.0.ffn.net.2`.
        tensor: The parameter; empty where the module's own work is off.
        kind: Where in it, and what it has become, as far as that is plain.
        ratio: So many times as far off as is explained.
    """

    module: str
    tensor: str
    kind: str
    ratio: Float


class Meant(Record):
    """What a declared change (a quantisation) explains of a candidate; see `truestep.judge.meant`.

    Attributes:
        change: Name of the quantiser; `siblings` where layers are set against one another alone.
        declared: As the command line had it: `auto` where the quantiser was inferred.
        outcome: `explained`: every layer is as far off as the change explains, and with the trusted
            weights put back nothing else differs. `fault`: one is further off, or something else
            differs. `undecided`: neither can be said.
        layers: Weights that were changed, `kept` those that were left as they are.
        worst: Of the changed weights the furthest, over what is explained. worst_layer: which.
        limit: Above which a layer would have been called broken.
        faults: The furthest first.
        rest: What a check says with the trusted weights put back.
        unjudged: Modules whose weights cannot be read.
    """

    change: str
    declared: str
    outcome: Literal["explained", "fault", "undecided"]
    text: str
    layers: int
    kept: int = 0
    worst: Float | None = None
    worst_layer: str = ""
    limit: Float | None = None
    faults: tuple[MeantFault, ...] = ()
    rest: str = ""
    unjudged: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 explained, 1 a fault, 4 undecided."""
        return {"explained": 0, "fault": 1, "undecided": 4}[self.outcome]

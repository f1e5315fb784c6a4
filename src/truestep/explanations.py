"""Where it broke and what explains it, as records: the first divergence, its cause, what else is
wrong, what a declared change explains. Pure: no I/O, no torch.
"""

from __future__ import annotations

from typing import Literal

from truestep.records import Float, Record


class Cause(Record):
    """What makes a module wrong: so changed, the trusted one gives what the candidate gave.

    Attributes:
        kind: Of what sort, in few words: `epsilon`.
        text: What is wrong with the candidate, with its values.
        patch: What mends it, in words, where that is one line.
        line: Of the trusted code, `file:line`, where the cause is about one.
        error_before, error_after: Relative distance of the candidate's outputs from those of the
            trusted module, as it is and so changed; the second is at the noise floor.
        tried: Hypotheses until this one.
    """

    kind: str
    text: str
    patch: str = ""
    line: str = ""
    error_before: Float
    error_after: Float
    tried: int


class Profile(Record):
    """A statistic of one tensor along an axis, where only its largest value is judged.

    Attributes:
        axis: `channel`, `frame`, `row`, `column` or `token`.
        statistic: What each value is, over the reference's rms; see `truestep.measure.profile`.
        values: One a place; of many places, the largest of as many consecutive ones.
        places: How many places there are.
    """

    axis: str
    statistic: str
    values: tuple[Float, ...]
    places: int


class Elsewhere(Record):
    """Another module that is wrong by itself, on right inputs.

    Attributes:
        fqn: It.
        cause: What explains it; None where nothing that was tried does.
    """

    fqn: str
    cause: Cause | None = None


class Recheck(Record):
    """What is left of a model's error once every module that is named gives what it should.

    The candidate's model runs freely on right inputs, and the modules named return what the
    trusted ones do.

    Attributes:
        modules: How many modules those are.
        error_before, error_after: Relative distance of what the model gives, as it is and so.
        ratio: How many times its floor the second is; None where a bound, not a floor, judged it.
        passed: Whether that is within the floor, at the first step and at the last one that was
            looked at: then nothing else in the model is wrong there.
        whole: Of the modules those that have others in them: all of each was replaced.
    """

    modules: int
    error_before: Float
    error_after: Float
    ratio: Float | None = None
    passed: bool
    whole: tuple[str, ...] = ()


class Divergence(Record):
    """The first place whose output differs beyond the floor while its input does not.

    `kind` is what the residual looks like; `operator` the call and line of code inside the module
    where the two sides part, and which weights differ; `file` and `line` that line again, below the
    folder of the check. `cause` explains it; `profile` is where along an axis the residual lies.
    `also` are the other modules that are wrong by themselves, `recheck` says whether that is all;
    both are looked for where a cause is.
    """

    name: str
    stage: str = ""
    step: int | None = None
    branch: str | None = None
    fqn: str | None = None
    modality: str | None = None
    kind: str | None = None
    operator: str | None = None
    file: str | None = None
    line: int | None = None
    cause: Cause | None = None
    profile: Profile | None = None
    also: tuple[Elsewhere, ...] = ()
    recheck: Recheck | None = None

    def __str__(self) -> str:
        parts = [f"`{self.fqn or self.name}`"]
        parts += [f"{self.stage} ({self.modality})"] if self.modality else []
        parts += [f"step {self.step}"] if self.step is not None else []
        parts += [self.branch] if self.branch else []
        return ", ".join(parts) + (f": {self.kind}" if self.kind else "")


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

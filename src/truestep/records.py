"""What results are made of: the base of every record, and what stands beside the rows of a
comparison: other gates, a known failure, the cost, pictures and sounds, what finished media show.

Pure: no I/O, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema
from typing_extensions import Self

from truestep.text import LONGEST, short


def _float_out(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


Float = Annotated[
    float,
    PlainSerializer(_float_out, return_type=float | str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}),
]
"""A float that survives strict JSON: NaN and infinities are written as strings."""


_NOTEBOOK = "truestep.report.notebook"

_WORD = 60
"""Letters of a text in a `repr`; a sentence has as many as there is room for."""


STATS = ("count", "nonfinite", "mean", "abs_mean", "std", "rms", "min", "max")
"""Order of the moments in a `stats/<name>` tensor (float64). `std` is the population's."""

SKETCH_SIZE = 1024
"""Floats in a `sketch/<name>` tensor (float32; see `truestep.measure.sketch`)."""


class Shown:
    """An object of which a notebook shows more than its `repr`.

    What it shows is written by one of the last rooms of the house, which is loaded by its name when
    a notebook asks: nothing here imports it.
    """

    def _repr_html_(self) -> str | None:
        text: str | None = import_module(_NOTEBOOK).html(self)
        return text

    def _repr_markdown_(self) -> str | None:
        text: str | None = import_module(_NOTEBOOK).markdown(self)
        return text


def line_of(model: BaseModel) -> str:
    """What a record says that is not its default: `Comparison(verdict=drifted, sentence='...')`."""
    parts: list[str] = []
    fields = type(model).model_fields
    for name in sorted(
        fields, key=lambda name: (name not in _FIRST, not fields[name].is_required())
    ):
        value = getattr(model, name)
        if value is None or name in _SILENT:
            continue
        if fields[name].is_required() or value != fields[name].get_default():
            parts.append(f"{name}={_value(name, value)}")
        if sum(map(len, parts)) > LONGEST:
            break
    return short(f"{type(model).__name__}({', '.join(parts)})", LONGEST)


_FIRST = frozenset({"verdict", "sentence", "name", "case_id", "exit_code"})
_SILENT = frozenset({"schema_version", "tool_version"})


def _value(name: str, value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return repr(short(value, LONGEST - 60 if name == "sentence" else _WORD))
    if isinstance(value, BaseModel):
        return type(value).__name__
    if isinstance(value, Mapping | Sequence):
        return f"<{len(value)}>"
    return short(repr(value), _WORD)


class Record(Shown, BaseModel):
    """Base of every record here: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, defer_build=True)

    def __repr__(self) -> str:
        return line_of(self)


class Light(Record):
    """A record of which there may be a million.

    Which of its fields were given is not remembered: that takes as much memory as all the rest.
    """

    def model_post_init(self, context: Any, /) -> None:
        """Share one set of the fields among all records of a class."""
        object.__setattr__(self, "__pydantic_fields_set__", _fields_of(type(self)))

    def __copy__(self) -> Self:
        """A copy shares it, too."""
        copied = super().__copy__()
        object.__setattr__(copied, "__pydantic_fields_set__", _fields_of(type(self)))
        return copied


@cache
def _fields_of(kind: type[Record]) -> set[str]:
    return set(kind.model_fields)


class GateResult(Record):
    """Outcome of another tool's gate, reproduced as one named rule beside ours.

    `passed` is None where all that could be judged holds, and something could not be judged; what
    and why is in `not_judged`.
    """

    name: str
    passed: bool | None
    metrics: dict[str, Float]
    thresholds: dict[str, Float]
    note: str = ""
    not_judged: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """`passes`, `fails` or `undecided`."""
        return {True: "passes", False: "fails", None: "undecided"}[self.passed]


class KnownFailure(Record):
    """What the ledger of known failures says of a comparison; see `truestep.judge.known`.

    Attributes:
        name: Of the ledger's entry.
        outcome: `known`: it drifts as stated, and passes as a known failure. `worse`, `elsewhere`,
            `better` and `passes` fail. `not judged`: the verdict is one that no ledger expects.
        text: The judgement in words.
        stage, modality: Where it is stated to drift.
        statistic: What is stated: `rel_l2`, or `ratio` to the floor.
        stated, measured: Its value; `measured` is the largest of the drifted tensors there.
        tolerance: Share, both ways, within which the two agree.
    """

    name: str
    outcome: Literal["known", "worse", "elsewhere", "better", "passes", "not judged"]
    text: str
    reason: str
    since: str
    stage: str
    modality: str | None = None
    statistic: Literal["rel_l2", "ratio"]
    stated: Float
    tolerance: Float
    measured: Float | None = None

    @property
    def accepted(self) -> bool:
        """Whether the comparison passes for it."""
        return self.outcome == "known"


RuleKind = Literal["known failure", "threshold", "reference", "case", "test"]


class RuleChange(Record):
    """Something that decides a verdict, and is not what it was in the promoted state.

    Attributes:
        file: Where it stands. key: what of it.
        actual, reference: Now and then, as text.
    """

    kind: RuleKind
    file: str
    key: str
    actual: str
    reference: str


class Cost(Record):
    """What the check cost, beside one full generation of the same case."""

    forwards: int = Field(description="transformer forwards run by the check (batch 1)")
    forwards_generation: int
    seconds: Float
    seconds_generation: Float | None = Field(
        default=None, description="of the recorded reference, on its own machine"
    )

    @property
    def share(self) -> float:
        """Forwards of the check as a share of a full generation."""
        return self.forwards / self.forwards_generation if self.forwards_generation else math.nan


class FrameTriple(Record):
    """A picture of both sides and of their difference; each a `data:image/png;base64,` URI.

    A frame of a video, the latent of a step, or a spectrogram, whose `index` is 0.
    """

    index: int
    actual: str
    reference: str
    difference: str


class SoundMetrics(Record):
    """Distances of two waveforms; see `truestep.measure.sound`.

    `rel_l2`, `correlation` and `spectrum_db` are None where the two differ in shape: they take
    sample for sample. NaN where a sample that they take is not finite.
    """

    rel_l2: Float | None
    correlation: Float | None = Field(description="Pearson's, channels centred; 1 is equal")
    level_db: Float = Field(description="rms of the actual side over the reference's, in dB")
    spectrum_db: Float | None = Field(description="mean absolute spectrogram difference, in dB")
    peak_actual: Float
    peak_reference: Float
    seconds_actual: Float
    seconds_reference: Float
    note: str = Field(default="", description="a side that is silent, or not finite")

    @property
    def seconds_difference(self) -> float:
        """Duration of the actual side less the reference's."""
        return self.seconds_actual - self.seconds_reference


class Sound(Record):
    """Two sounds to hear and to see.

    Attributes:
        sample_rate: Hz.
        metrics: Of the whole waveforms, all samples of the batch.
        actual, reference: The first sample as it is, no louder, as `data:audio/wav;base64,` URI.
        difference: Their difference, as many times as loud as `difference_gain` says; empty where
            they differ in shape, or not at all.
        seconds_shown: How much of it is to be heard and seen.
        spectrograms: Both and their difference, as `data:image/png;base64,` URIs.
        difference_db: What is white in the picture of the difference.
    """

    sample_rate: int
    metrics: SoundMetrics
    actual: str = ""
    reference: str = ""
    difference: str = ""
    difference_gain: Float = 1.0
    seconds_shown: Float = 0.0
    spectrograms: FrameTriple | None = None
    difference_db: Float = 0.0


class MediaFinding(Record):
    """Something that decoded media show.

    Attributes:
        kind: `frame shift`, `other size`, ... in words; `docs/media.md` lists them.
        modality: What it is of; None for a whole file.
        text: The finding as a sentence, with its numbers.
        effect: The verdict that it makes alone.
        value, unit: Its size, where it has one.
        frames: Numbers of the frames of the actual side that it is about; empty for all.
        before, after: Root mean square of the difference, once without and once with the same done
            to the reference: in levels of 8 bits for pictures, over the rms of the reference for
            sound. None for what needs no such proof.
    """

    kind: str
    modality: Literal["audio", "video"] | None = None
    text: str
    effect: Literal["invalid", "drifted", "incomparable", "inconclusive"]
    value: Float | None = None
    unit: str = ""
    frames: tuple[int, ...] = ()
    before: Float | None = None
    after: Float | None = None


class FrameScore(Light):
    """How far one frame is from its partner; numbers of both sides' frames, from 0.

    `psnr_db` is infinite where the two are equal at 8 bits; `ssim` is NaN where a side is below 11
    pixels. `rms` is in levels of 8 bits.
    """

    actual: int
    reference: int
    psnr_db: Float
    ssim: Float
    rms: Float


class MediaRun(Record):
    """A run of the trusted side, or the one under test, on the ladder.

    Attributes:
        distance: From the reference: rms in levels of 8 bits of frames reduced to 128 pixels, and
            the mean difference of spectrograms in dB where there is only sound.
        score: Mean distance from all runs of one seed, which the rank is of.
        copy_of: The file that it is a copy of, byte for byte; empty for none.
    """

    label: str
    role: Literal["actual", "reference", "same seed", "other seed"]
    distance: Float
    score: Float | None = None
    copy_of: str = ""


class Ladder(Record):
    """Where a difference lies between reruns and other seeds; see `truestep.judge.ladder`.

    Attributes:
        place: In words.
        p_value: Of the run under test among all runs of one seed, by its rank; None without any.
        needed: Runs with the same seed from which on a rank can decide.
        ratio: Its score over the largest of the trusted runs.
        runs: All of them, nearest first.
    """

    place: str
    text: str
    p_value: Float | None = None
    needed: int
    ratio: Float | None = None
    unit: str
    runs: tuple[MediaRun, ...]


class Rule(Record):
    """The rule that judged, printed with every verdict."""

    name: str
    text: str


class Rung(Record):
    """Ends of free runs of one kind on the trusted side.

    Attributes:
        distance: rel_l2 from the reference's end: of the furthest, and of other seeds the nearest.
        of: Which harmless change that run was.
    """

    name: Literal["rerun", "benign twin", "other kernel or machine", "other seed"]
    distance: Float
    runs: int
    of: str = ""


class Shift(Record):
    """What moved the end of a free run; see `truestep.judge.shift`.

    Attributes:
        text: In one sentence.
        stage: The stage that made it, of a fault.
        distance: rel_l2 of the end from the reference's; `ratio` is that over its floor.
        place: Between which rungs it lies, in words.
        ladder: The rungs and the candidate in order, in words.
        seen_from: Smallest relative change that would have been called a fault in any stage.
    """

    outcome: Literal["benign shift", "fault", "undecided", "unexplained"]
    text: str
    stage: str = ""
    distance: Float
    ratio: Float | None = None
    place: str
    rungs: tuple[Rung, ...] = ()
    ladder: str
    seen_from: Float | None = None


class MediaFacts(Record):
    """What one file of media is."""

    what: str
    form: str = ""
    colours: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: Float | None = None
    seconds: Float | None = None
    sample_rate: int | None = None
    channels: int = 0
    samples: int = 0


class MediaEvidence(Record):
    """What finished media show of two runs. It is the lowest level of evidence.

    Attributes:
        level: Latents, stages and modules show more.
        limits: What media cannot show, in words.
        scores: Of every pair of frames, in order.
        psnr_db: Of all of them together.
        perceptual_jod: ColorVideoVDP's just-objectionable differences, 10 is none; None where it
            was not asked for.
    """

    level: Literal["media"] = "media"
    limits: str
    actual: MediaFacts
    reference: MediaFacts
    findings: tuple[MediaFinding, ...] = ()
    scores: tuple[FrameScore, ...] = ()
    psnr_db: Float | None = None
    ssim: Float | None = None
    perceptual_jod: Float | None = None
    ladder: Ladder | None = None


class Media(Record):
    """Frames to look at, or a sound to hear.

    `axis` says what the numbers of the frames count: frames, or denoise steps. `gain` is the factor
    by which the differences of frames were multiplied. `width` and `height` are of a frame, or of a
    spectrogram's picture. `origin` says what was decoded: the reference's own latent, or what the
    candidate's free run ended in.
    """

    name: str
    width: int
    height: int
    gain: Float
    frames: tuple[FrameTriple, ...]
    sound: Sound | None = None
    origin: str = ""
    axis: Literal["frame", "step"] = "frame"

    def measured(self) -> Media:
        """What was measured of it, without what is to be seen and heard."""
        sound = self.sound
        bare = Sound(sample_rate=sound.sample_rate, metrics=sound.metrics) if sound else None
        return self.model_copy(update={"frames": (), "sound": bare})

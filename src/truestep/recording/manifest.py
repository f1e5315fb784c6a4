"""What a recording says about itself: the JSON manifest in the safetensors header. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, GetPydanticSchema

from truestep.floors import NoiseFloor
from truestep.many import schema_of
from truestep.verdict import Float, Record

FORMAT_VERSION = 3
"""The newest that is read. Written is 1; 2 where the table is kept beside the header; 3 where there
are calls."""

PACKED = 2
"""The first version that knows packed recordings: see `recording.columns`."""

CALLS = 3
"""The first version that knows calls: see `truestep.calls.recording`."""

LEFT_OUT = "left_out"
"""Setting of a thinned recording: names of the tensors that were recorded, and left out of it."""

Keep = tuple[int, ...] | Literal["all"]
"""What a recording keeps: everything, or what checks read at default steps and at these."""

KEY_FRAMES = "key_frames"
"""Setting of a bundle that holds pictures of what was made: see `recording.keyframes`."""

METADATA_KEY = "truestep"
DIGEST_KEY = "truestep_digest"

Level = Literal["stats", "sketch", "full"]
"""What is stored of each tensor: its moments; its moments and a sketch; the tensor itself."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of the tensor table. There may be a million, and a model of pydantic's takes 2 kB.

    `digest` is xxh3_64 of the stored bytes, hexadecimal: of the tensor, or of its moments
    (`stats/<name>`, float64). `sketch_digest` is that of `sketch/<name>`, and written at level
    `sketch` only. `dtype` and `shape` are of the recorded tensor at every level. A digest that
    begins with `sha256:` is SHA-256 instead: what can be made without xxhash.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    kind: str
    order: int
    dtype: str
    shape: tuple[int, ...]
    digest: str
    sketch_digest: str = ""
    step: int | None = None
    branch: str | None = None
    fqn: str | None = None
    call: int = 0


@dataclass(frozen=True, slots=True)
class CallEntry:
    """One call of a component; the trees are described in `truestep.calls.values`.

    `call` is its number within step and stage, `owner` the class that was called, `dtype` that of
    its weights, `parameters` the names that arguments without one have. `written` is what arguments
    held afterwards where the call changed them, `state` what a scheduler then held, `random` the
    states of generators that the call moved: name of the argument, or of the device whose own one
    it is (`cuda:0`; none: the CPU's), and of the tensor. `live`: the call has to be made for what
    cannot be kept.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    component: str
    method: str
    kind: str
    stage: str
    call: int
    owner: str
    parameters: tuple[str, ...]
    arguments: dict[str, Any]
    output: Any
    dtype: str = ""
    step: int | None = None
    context: str | None = None
    written: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    random: tuple[tuple[str, str], ...] = ()
    live: bool = False


class Implementation(Record):
    """The code and the weights that made a recording.

    Attributes:
        commits: Of libraries that were installed from a repository, by name.
        quantised: Models whose weights are stored, or were rounded, in fewer bits than they seem.
        patched: Functions that are not those of the class or library that they go by.
    """

    commits: dict[str, str] = Field(default_factory=dict)
    quantised: tuple[str, ...] = ()
    patched: tuple[str, ...] = ()


class Manifest(Record):
    """Everything a reader may want to know before it touches a tensor."""

    format_version: int = 1
    tool_version: str
    created: str = Field(description="UTC, ISO 8601")
    level: Level
    case_id: str | None = None
    case: dict[str, Any] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    tensors: Annotated[
        Sequence[TensorEntry],
        GetPydanticSchema(lambda _, handler: schema_of(tuple[TensorEntry, ...], handler, tuple)),
    ] = ()
    calls: tuple[CallEntry, ...] = Field(
        default=(), description="every outermost call of a component, in order"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="of a packed recording: column of the table to digest"
    )
    timings_s: dict[str, tuple[Float, ...]] = Field(default_factory=dict)
    forwards: int = 0
    noise_floor: NoiseFloor | None = None
    notes: tuple[str, ...] = ()
    implementation: Implementation = Field(default_factory=Implementation)

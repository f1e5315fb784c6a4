"""Cases of any pipeline: a model, and the arguments of its own call. No torch.

In a case file::

    [case.cat]
    model = "./flux"
    subject = "diffusers"
    seed = 0
    scheduler = "EulerDiscreteScheduler"
    scheduler_settings = { shift = 2.0 }
    lora = ["style.safetensors:0.8"]
    prepare = "port.py:fuse"

    [case.cat.call]
    prompt = "a cat"
    num_inference_steps = 20

    [case.cat.input]
    image = "cat.png"
"""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from truestep.content import case_differences, invalid_case, readable_id
from truestep.errors import CaseError
from truestep.files import sha256_of
from truestep.records import Shown, line_of
from truestep.text import nearest
from truestep.verdict import Difference

CALL_TABLES = ("call", "input", "scheduler_settings")
"""Tables of such a case that are no tiers."""

PREPARATION = ("lora", "prepare")
"""Keys of what is done to a pipeline before it runs."""

_MARKS = ("subject", "pipeline", "call", "input", "scheduler_settings")
_CALL = "call."
_SCHEDULER = "scheduler."
_SHA256 = "sha256"
_PREPARE = "prepare"
_BLOCK = 1 << 20


def _switched(value: object) -> object:
    """`true` and `false` as `on` and `off`."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


COMPILE_MODES = ("off", "on", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What `compile` may be: off, torch.compile's default, or one of its modes."""

CompileMode = Annotated[
    Literal["off", "on", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    BeforeValidator(_switched),
]


@dataclass(frozen=True)
class Lora:
    """Low-rank weights that are laid over a model's, and how much of them."""

    path: str
    scale: float

    @classmethod
    def of(cls, text: str) -> Lora:
        """`PATH:SCALE`, or a path alone, whose scale is 1."""
        path, _, number = text.rpartition(":")
        try:
            scale = float(number)
        except ValueError:
            path, scale = text, 1.0
        if not path or not math.isfinite(scale):
            raise ValueError(f"a LoRA is given as PATH:SCALE, not {text!r}")
        return cls(_normal(path), scale)

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"


def is_call_case(content: Mapping[str, Any]) -> bool:
    """Whether a table is a case of this kind: one of the runtime has none of these keys."""
    return any(key in content for key in _MARKS)


class CallCase(Shown, BaseModel):
    """What to generate: a pipeline, and what its call is given.

    Attributes:
        model, revision: A diffusers folder or a hub id.
        subject: What runs it.
        pipeline: Class of the pipeline; None is the model's own.
        seed: Of the call's generator, on the CPU.
        dtype: What `from_pretrained(dtype=...)` is given.
        device: Where it runs; None is CUDA where there is one. Not part of the case's id.
        scheduler, scheduler_settings: A scheduler class in the place of the model's own, and what
            differs from the configuration of the model's.
        call: Arguments of the call; all others have the pipeline's defaults.
        input: Arguments that are files: pictures, videos, sounds, tensors. Several are a list.
        lora: LoRA files, each `PATH:SCALE`; they are loaded before anything else is done.
        prepare: `FILE.py:FUNCTION` that is given the loaded pipeline and changes it, or returns
            another. Of a case, the reference and every candidate are prepared so.
        compile: Whether the denoisers run through torch.compile, and in which of its modes. Not
            part of the case's id: it is a change under test.
        sha256: Of what `input.NAME`, `lora.PATH` and `prepare` held where they were read: 16
            digits. Not part of the case's id; one that is on one side only is no difference.

    Raises:
        CaseError: A key is unknown or a value is out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __repr__(self) -> str:
        return line_of(self)

    model: str = Field(min_length=1)
    revision: str | None = None
    subject: Literal["diffusers"] = "diffusers"
    pipeline: str | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")
    scheduler: str | None = Field(default=None, min_length=1)
    scheduler_settings: dict[str, Any] = Field(default_factory=dict)
    call: dict[str, Any] = Field(default_factory=dict)
    input: dict[str, tuple[str, ...] | str] = Field(default_factory=dict)
    lora: tuple[str, ...] = ()
    prepare: str | None = None
    compile: CompileMode = "off"
    sha256: dict[str, str] = Field(default_factory=dict)

    _base: Path | None = PrivateAttr(default=None)
    _model_base: Path | None = PrivateAttr(default=None)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise invalid_case(error, likely=_meant) from None
        both = sorted(self.call.keys() & self.input.keys())
        if both:
            raise CaseError(
                f"{both[0]} is given twice: as a value and as a file",
                where="case",
                hint=f"leave {both[0]} out of the case",
            )

    @field_validator("call", "scheduler_settings")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        _require_plain(value, "")
        return value

    @field_validator("input")
    @classmethod
    def _named(cls, value: dict[str, tuple[str, ...] | str]) -> dict[str, tuple[str, ...] | str]:
        files = {
            name: _normal(given) if isinstance(given, str) else tuple(map(_normal, given))
            for name, given in value.items()
        }
        if not all(files.values()):
            raise ValueError("a file has no name")
        return files

    @field_validator("lora", mode="before")
    @classmethod
    def _scaled(cls, value: Any) -> Any:
        given = (value,) if isinstance(value, str) else () if value is None else value
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            raise ValueError("give a list of PATH:SCALE")
        return tuple(str(Lora.of(one)) for one in given)

    @field_validator("prepare")
    @classmethod
    def _a_function(cls, value: str | None) -> str | None:
        file, _, name = (value or "").rpartition(":")
        if value is not None and not (file.endswith(".py") and name.isidentifier()):
            raise ValueError("it is given as FILE.py:FUNCTION")
        return None if value is None else f"{_normal(file)}:{name}"

    @property
    def prompt(self) -> str:
        """The text that it is called by, as far as there is one."""
        given = self.call.get("prompt")
        return given if isinstance(given, str) else ""

    @property
    def model_path(self) -> Path:
        """The model as a path; one written relative in a case file counts from that file."""
        path = Path(self.model).expanduser()
        return self._model_base / path if self._model_base else path

    def counted_from(self, folder: Path) -> CallCase:
        """The same case, whose files are written relative to a folder, as its model may be."""
        self._base = folder
        self._model_base = folder if self.model.startswith(".") else None
        return self

    def files(self, name: str) -> list[Path]:
        """The files of an argument; those written relative in a case file count from it."""
        given = self.input[name]
        return list(map(self.path_of, (given,) if isinstance(given, str) else given))

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs, taken apart."""
        return tuple(map(Lora.of, self.lora))

    def path_of(self, written: str) -> Path:
        """A file of the case; one written relative in a case file counts from it."""
        path = Path(written).expanduser()
        return self._base / path if self._base else path

    def sources(self) -> dict[str, list[Path]]:
        """The files that the case is made of, by what they are for: see `sha256`."""
        files = {f"input.{name}": self.files(name) for name in self.input}
        files |= {f"lora.{lora.path}": [self.path_of(lora.path)] for lora in self.loras}
        if self.prepare is not None:
            files[_PREPARE] = [self.path_of(self.prepare.rpartition(":")[0])]
        return files

    def with_hashes(self) -> CallCase:
        """The same case with the hashes of those of its files that are there."""
        files = {name: paths for name, paths in self.sources().items() if _there(paths)}
        return self.model_copy(update={_SHA256: {k: _digest(v) for k, v in files.items()}})

    @property
    def prepared(self) -> str:
        """What is done to the pipeline before it runs, in words."""
        said = [] if self.prepare is None else [self.prepare]
        return ", ".join([*said, *(f"lora {lora.path} x {lora.scale:g}" for lora in self.loras)])

    @property
    def id(self) -> str:
        """Readable, collision-free and safe as a file name: slugs plus 12 digits of a SHA-256."""
        content = {key: value for key, value in self.canonical().items() if key != _SHA256}
        return readable_id(content, self.model, self.pipeline or "", self.prompt)

    def canonical(self) -> dict[str, Any]:
        """What is said but for device and compile, and what its files held when read."""
        content = self.model_dump(mode="json", exclude={"device", "compile"})
        kept = ("model", "subject", "seed", "dtype", "call")
        return {k: v for k, v in content.items() if k in kept or v not in (None, {}, [])}

    def differences(self, reference: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Keys whose values differ from another case's content, dotted."""
        here, there = self.canonical(), dict(reference)
        own, other = here.pop(_SHA256, {}), there.pop(_SHA256, {})
        if isinstance(other, Mapping):  # files that were read on one side only tell nothing
            here[_SHA256] = {key: value for key, value in own.items() if key in other}
            there[_SHA256] = {key: value for key, value in other.items() if key in own}
        return case_differences(here, there)

    def replace(self, **changes: Any) -> CallCase:
        """A copy with other values: of the case, of its scheduler (`scheduler.shift`), or else of
        the pipeline's call, whose own signature says what there is.

        Raises:
            CaseError: A value is out of range.
        """
        data = self.model_dump(exclude={_SHA256})
        for key, value in changes.items():
            if key in type(self).model_fields:
                data[key] = value
            elif key.startswith(_SCHEDULER):
                data["scheduler_settings"][key.removeprefix(_SCHEDULER)] = value
            else:
                name = key.removeprefix(_CALL)
                data["call"][name] = value
                data["input"].pop(name, None)
        replaced = CallCase(**data)
        replaced._base = self._base
        replaced._model_base = None if "model" in changes else self._model_base
        return replaced


def _normal(path: str) -> str:
    return posixpath.normpath(path) if path else path


def _there(paths: Sequence[Path]) -> bool:
    return all(path.is_file() and os.access(path, os.R_OK) for path in paths)


def _digest(paths: Sequence[Path]) -> str:
    """16 digits of a SHA-256 over what files hold, one after the other."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(bytes.fromhex(sha256_of(path)))
    return whole.hexdigest()[:16]


def _require_plain(value: Any, where: str) -> None:
    """Refuse what JSON does not hold: a date of TOML, an infinite number."""
    if isinstance(value, dict):
        for key, part in value.items():
            _require_plain(part, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _require_plain(part, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is not a finite number")
    elif not isinstance(value, str | int | float | bool | type(None)):
        raise ValueError(f"{where} is a {type(value).__name__}: give text, numbers or lists")


def _meant(key: str) -> str:
    """What may have been meant by a key that there is not."""
    near = nearest(key, CallCase.model_fields)
    return near or "arguments of the pipeline's call stand in [case.NAME.call]"

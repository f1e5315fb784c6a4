"""Cases of any pipeline: a model, and the arguments of its own call. No torch.

In a case file::

    [case.cat]
    model = "./flux"
    subject = "diffusers"
    seed = 0
    scheduler = "EulerDiscreteScheduler"
    scheduler_settings = { shift = 2.0 }

    [case.cat.call]
    prompt = "a cat"
    num_inference_steps = 20

    [case.cat.input]
    image = "cat.png"
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from truestep.content import case_differences, invalid_case, readable_id
from truestep.errors import CaseError
from truestep.text import nearest
from truestep.verdict import Difference

CALL_TABLES = ("call", "input", "scheduler_settings")
"""Tables of such a case that are no tiers."""

_MARKS = ("subject", "pipeline", "call", "input", "scheduler_settings")
_CALL = "call."
_SCHEDULER = "scheduler."


def is_call_case(content: Mapping[str, Any]) -> bool:
    """Whether a table is a case of this kind: one of the runtime has none of these keys."""
    return any(key in content for key in _MARKS)


class CallCase(BaseModel):
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

    Raises:
        CaseError: A key is unknown or a value is out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        parts = (given,) if isinstance(given, str) else given
        paths = [Path(part).expanduser() for part in parts]
        return [self._base / path if self._base else path for path in paths]

    @property
    def id(self) -> str:
        """Readable, collision-free and safe as a file name: slugs plus 12 digits of a SHA-256."""
        return readable_id(self.canonical(), self.model, self.pipeline or "", self.prompt)

    def canonical(self) -> dict[str, Any]:
        """Content that the id hashes: what is said, but for the device."""
        content = self.model_dump(mode="json", exclude={"device"})
        kept = ("model", "subject", "seed", "dtype", "call")
        return {k: v for k, v in content.items() if k in kept or v not in (None, {})}

    def differences(self, reference: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Keys whose values differ from another case's content, dotted."""
        return case_differences(self.canonical(), reference)

    def replace(self, **changes: Any) -> CallCase:
        """A copy with other values: of the case, of its scheduler (`scheduler.shift`), or else of
        the pipeline's call, whose own signature says what there is.

        Raises:
            CaseError: A value is out of range.
        """
        data = self.model_dump()
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

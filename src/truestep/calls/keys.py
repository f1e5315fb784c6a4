"""Where a tensor of a call belongs, as a value; as text only in files and tables. No torch.

The text is `step/0003/prediction/transformer/forward/0/out/sample`: step (where there is one),
stage, component, method, number of the call within step and stage, side, and the path inside the
argument or output, joined by dots. Before it stands the precision, where it was raised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from truestep.keys import PRECISIONS

Side = Literal["in", "out"]
Path = tuple[str, ...]

STAGES = (
    "text",
    "schedule",
    "latent",
    "prediction",
    "guidance",
    "update",
    "decoding",
    "output",
)
"""Parts of a run; `output` is all there is of a run without steps."""

EMPTY = "%"
"""What stands for a name without letters: no other text is escaped to it."""

_UNSAFE = re.compile("[%/.\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
_ESCAPED = re.compile("%u([0-9A-F]{4})|%([0-9A-F]{2})")
_SAFE = re.compile(
    "(?:[^%/.\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]|%u[0-9A-F]{4}|%[0-9A-F]{2})+"
)


@dataclass(frozen=True)
class Key:
    """The address of one tensor of a recorded run.

    Attributes:
        stage: One of `STAGES`.
        component, method: Whose call it is.
        call: Number of the call within its step and stage.
        side: What the call was given, or what it gave.
        path: Argument and place in it; place in the output.
        step: Denoise step from 0; None before and after the steps.
        precision: That everything was raised to, if so.
    """

    stage: str
    component: str
    method: str
    call: int
    side: Side
    path: Path = ()
    step: int | None = None
    precision: str = ""

    def __str__(self) -> str:
        """The text in files; `key_of` reads it."""
        head = [self.precision] if self.precision else []
        head += ["step", f"{self.step:04d}"] if self.step is not None else []
        names = [self.stage, _escape(self.component), _escape(self.method)]
        tail = [".".join(map(_escape, self.path))] if self.path else []
        return "/".join([*head, *names, str(self.call), self.side, *tail])


def key_of(text: str) -> Key:
    """Read the text of a key.

    Raises:
        ValueError: It is not one.
    """
    parts = text.split("/")
    precision = parts.pop(0) if parts[0] in PRECISIONS else ""
    step = None
    if parts[:1] == ["step"] and len(parts) > 1:
        step = _number(parts[1], text)
        parts = parts[2:]
    if len(parts) not in (5, 6) or parts[0] not in STAGES or parts[4] not in ("in", "out"):
        raise ValueError(f"not the key of a tensor: {text[:80]!r}")
    key = Key(
        stage=parts[0],
        component=_plain(parts[1]),
        method=_plain(parts[2]),
        call=_number(parts[3], text),
        side="in" if parts[4] == "in" else "out",
        path=tuple(_plain(part) for part in parts[5].split(".")) if parts[5:] else (),
        step=step,
        precision=precision,
    )
    if str(key) != text:  # one text a key: `01` is no number, `%41` no escape of a letter
        raise ValueError(f"not the key of a tensor: {text[:80]!r}")
    return key


def dotted(path: Path) -> str:
    """A path for people: `sample`, `args.0`; nothing of an empty one."""
    return ".".join(path)


def _number(part: str, text: str) -> int:
    if not part.isascii() or not part.isdecimal() or len(part) > 18:
        raise ValueError(f"not the key of a tensor: {text[:80]!r}")
    return int(part)


def _escape(name: str) -> str:
    return _UNSAFE.sub(_code, name) or EMPTY


def _code(match: re.Match[str]) -> str:
    number = ord(match.group())
    return f"%{number:02X}" if number < 256 else f"%u{number:04X}"


def _plain(part: str) -> str:
    if part == EMPTY:
        return ""
    if not _SAFE.fullmatch(part):
        raise ValueError(f"not a name in a key: {part[:80]!r}")
    return _ESCAPED.sub(lambda match: chr(int(match[1] or match[2], 16)), part)

"""Everything truestep raises on purpose.

::

    TruestepError                 exit 2
    ├── UsageError                exit 2   an option or argument that cannot mean anything
    │   ├── CaseError             exit 2   a case or a case file
    │   └── MissingExtraError     exit 2   an optional dependency is not installed
    ├── FileFormatError           exit 2   a file that is unreadable, damaged or hostile
    ├── WriteError                exit 2   a file that could not be written (nothing was replaced)
    ├── ModelLoadError            exit 2   a model that could not be loaded
    ├── EndpointError             exit 2   a server that does not answer as its interface says
    ├── ProcessEndedError         exit 1   code that is not ours ended the process: `invalid`
    ├── ReferenceNotFoundError    exit 3   no reference for a case
    ├── ComponentMissingError     exit 3   a part that a parity test needs is not there
    ├── ParityError               exit 1   a parity test that proves nothing; an AssertionError
    └── EquivalenceError          exit of its verdict; also an AssertionError

Every message has up to five parts in one order: what, where, measured against allowed, likely
cause, hint with the command to run next.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from truestep.text import visible

if TYPE_CHECKING:
    from truestep.verdict import Comparison

FOREIGN = (Exception, SystemExit)
"""What code that is not ours may raise and what then is its outcome. An interrupt is none."""

_WIDTH = 100
_MAX_LINES = 25


def _block(label: str, text: str) -> list[str]:
    """Indent `text` under a label, wrapping single-line text and keeping tables as they are."""
    lead = f"  {label:<8} "
    if "\n" in text and label == "measured":  # a table; nothing else has lines of its own
        return [lead.rstrip(), *("  " + visible(line) for line in text.split("\n"))]
    return textwrap.wrap(
        visible(text),
        width=_WIDTH,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )


class TruestepError(Exception):
    """A failure that tells the reader what to do.

    Args:
        what: One sentence: what went wrong.
        where: The file, key, tensor or option concerned.
        measured: What was found against what is allowed; may be a table of several lines.
        likely: The likely cause.
        hint: The exact command (or change) that comes next.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        measured: str = "",
        likely: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.measured = what, where, measured
        self.likely, self.hint = likely, hint

    def __str__(self) -> str:
        body: list[str] = []
        for label, text in (("where", self.where), ("measured", self.measured)):
            if text:
                body += _block(label, text)
        if self.likely:
            body += _block("likely", self.likely)
        tail = ["", f"hint: {visible(self.hint)}"] if self.hint else []
        room = _MAX_LINES - len(tail) - 2
        if len(body) > room:
            cut = len(body) - room + 1
            body = [*body[: room - 1], f"  ... {cut} more lines"]
        return "\n".join([visible(self.what), *([""] if body else []), *body, *tail])

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(cls: type[TruestepError], state: dict[str, object]) -> TruestepError:
    error = cls.__new__(cls)
    Exception.__init__(error, state.get("what", ""))
    error.__dict__.update(state)
    return error


class UsageError(TruestepError):
    """An option, an argument or a combination of them that cannot mean anything."""


class CaseError(UsageError):
    """A case or case file that is not valid."""


class MissingExtraError(UsageError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"pip install 'truestep[{extra}]'",
        )


class FileFormatError(TruestepError):
    """A file that cannot be read: absent, truncated, damaged, hostile or of an unknown version."""


class WriteError(TruestepError):
    """A file that could not be written; what was there before is untouched."""


class ModelLoadError(TruestepError):
    """A model that could not be loaded."""


class EndpointError(TruestepError):
    """A server that cannot be reached, or does not answer as its interface says."""


class ProcessEndedError(TruestepError):
    """Code that is not ours ended the process, or tried to, before anything was judged."""

    exit_code = 1


@contextmanager
def surviving(what: str) -> Iterator[None]:
    """Make an error of an attempt of code that is not ours to end the process.

    Raises:
        ProcessEndedError: The block raised SystemExit.
    """
    try:
        yield
    except SystemExit as error:
        raise ProcessEndedError(
            f"{what} ended the process (SystemExit: {error.code})",
            where=last_frame(error),
            likely="a call of sys.exit() or exit() where an exception is meant",
        ) from error


def one_line(error: BaseException) -> str:
    """An exception as one line: its class and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def is_foreign(error: BaseException) -> bool:
    """Whether code that is neither ours nor a library's had a part in raising this."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, SystemExit) or any(is_foreign_file(f.filename) for f in frames)


def is_foreign_file(file: str) -> bool:
    """Whether a source file is neither ours nor of an installed library."""
    import sysconfig

    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = (os.path.join(path, "") for path in (*known, os.path.dirname(__file__)))
    return not file.startswith((*folders, "<frozen"))


def last_frame(error: BaseException) -> str:
    """`file:line` of where an exception was raised."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


class ReferenceNotFoundError(TruestepError):
    """No reference exists for a case."""

    exit_code = 3


class ComponentMissingError(TruestepError):
    """A part that a parity test needs is not there; the test is skipped for this reason alone.

    Attributes:
        kind: `port_class`, `official_import`, `weights` or `converted_weights`.
        detail: Exactly what is missing.
        searched: Where it was looked for.
        decision: Who has to decide what, if the component is blocked.
    """

    exit_code = 3

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        searched: tuple[str, ...] = (),
        decision: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(
            f"missing: {kind}: {detail}",
            where="; ".join(searched),
            likely=f"blocked: {decision}" if decision else "",
            hint=hint,
        )
        self.kind, self.detail, self.searched, self.decision = kind, detail, searched, decision


class ParityError(TruestepError, AssertionError):
    """A parity test whose numbers agree but prove nothing, or that may no longer pass."""

    exit_code = 1


class EquivalenceError(TruestepError, AssertionError):
    """The candidate is not the same model as the reference, or nothing could be said.

    Attributes:
        comparison: The whole comparison, with its verdict and its rows.
    """

    def __init__(self, comparison: Comparison) -> None:
        what, where, measured, likely, hint = comparison.explain()
        super().__init__(what, where=where, measured=measured, likely=likely, hint=hint)
        self.comparison = comparison

"""What a parity test may skip for: one named part that is not there, and where it was looked for.

Everything else that goes wrong is an error. An import that fails inside the port, a class that
cannot be built and a checkpoint that does not load are red, never a skip.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from truestep.errors import ComponentMissingError, UsageError
from truestep.parity.redaction import redact


class MissingKind(str, Enum):
    """The four things that a parity test may lack."""

    PORT_CLASS = "port_class"
    OFFICIAL_IMPORT = "official_import"
    WEIGHTS = "weights"
    CONVERTED_WEIGHTS = "converted_weights"

    __str__ = str.__str__


def missing(
    kind: MissingKind | str,
    what: str,
    *,
    searched: Sequence[str] = (),
    decision: str = "",
    hint: str = "",
) -> ComponentMissingError:
    """The error to raise where a part is not there; the test is skipped with this reason.

    Args:
        kind: `port_class`, `official_import`, `weights` or `converted_weights`.
        what: Exactly what is missing: a module and class, a file, a repository and revision.
        searched: Where it was looked for.
        decision: Who has to decide what; with it the component is `blocked`, not `scaffold_skip`.
        hint: What supplies it.

    Raises:
        UsageError: The kind is none of the four, or nothing is named.
    """
    kinds = [member.value for member in MissingKind]
    if str(kind) not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        raise UsageError(
            f"{str(kind)!r} is no reason to skip a parity test",
            measured=f"there are: {', '.join(kinds)}",
            likely=f"did you mean {near[0]!r}?" if near else "",
        )
    if not what.strip():
        raise UsageError(f"missing {kind}: say exactly what is missing")
    return ComponentMissingError(
        str(kind),
        redact(what),
        searched=tuple(redact(place) for place in searched),
        decision=redact(decision),
        hint=hint,
    )


_imported: list[Any] = []
_ported: list[Any] = []


def take_imported() -> tuple[Any, ...]:
    """Official classes imported since the last call, for the component packet."""
    found = tuple(_imported)
    _imported.clear()
    return found


def take_ported() -> tuple[Any, ...]:
    """Classes and functions of the port imported since the last call: they are its code."""
    found = tuple(_ported)
    _ported.clear()
    return found


def variable_prefix(family: str) -> str:
    """`LTX_2` of `ltx-2`: the start of a family's environment variables."""
    return re.sub(r"[^A-Z0-9]+", "_", family.upper()).strip("_")


@dataclass(frozen=True)
class Family:
    """Where the parts of one model family are found; each place has an environment override.

    Args:
        name: `wan`, `ltx-2`; the overrides are `<NAME>_OFFICIAL_REF_DIR`,
            `<NAME>_LOCAL_WEIGHTS_DIR` and `<NAME>_CONVERTED_WEIGHTS_DIR`.
        official_dir: Default folder of the official repository; None where it is installed.
        weights_dir: Default folder of the official weights.
        converted_dir: Default folder of the weights converted for the port.
    """

    name: str
    official_dir: str | Path | None = None
    weights_dir: str | Path | None = None
    converted_dir: str | Path | None = None

    def variable(self, part: str) -> str:
        """`WAN_OFFICIAL_REF_DIR` of `OFFICIAL_REF`."""
        return f"{variable_prefix(self.name)}_{part}_DIR"

    def official_class(self, spec: str) -> Any:
        """Import `package.module:Class` of the official implementation.

        Raises:
            ComponentMissingError: The module, a module that it imports, or the class is not there.
            UsageError: It was imported from outside the official folder.
        """
        kind = MissingKind.OFFICIAL_IMPORT
        folder = self._folder("OFFICIAL_REF", self.official_dir)
        searched: tuple[str, ...] = ("installed packages", f"${self.variable('OFFICIAL_REF')}")
        if folder is not None:
            if not folder.is_dir():
                raise missing(kind, f"folder {folder}", searched=(str(folder),))
            searched = (str(folder), "installed packages")
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
        hint = "" if folder else f"set it: export {self.variable('OFFICIAL_REF')}=DIR"
        module = _import(spec, kind, searched, hint=hint)
        home = Path(module.__file__ or "").resolve()
        if folder is not None and folder.resolve() not in home.parents:
            raise UsageError(
                f"{module.__name__} was not imported from the official folder",
                where=str(home),
                measured=f"expected below {folder}",
                likely="an installed package of the same name comes first",
                hint=f"unset {self.variable('OFFICIAL_REF')}  # tests the installed package",
            )
        found = _attribute(module, spec, kind)
        _imported.append(found)
        return found

    def port_class(self, spec: str) -> Any:
        """Import `package.module:Class` of the port.

        Raises:
            ComponentMissingError: The module or the class does not exist yet. Anything that fails
                inside it is raised as it is.
        """
        module = _import(spec, MissingKind.PORT_CLASS, ("installed packages", "the test's folder"))
        found = _attribute(module, spec, MissingKind.PORT_CLASS)
        _ported.append(found)
        return found

    def weights(self, *patterns: str) -> list[Path]:
        """Files of the official weights, by glob patterns below the weights folder.

        Raises:
            ComponentMissingError: The folder is not known or a pattern matches nothing.
        """
        return self._files(MissingKind.WEIGHTS, "LOCAL_WEIGHTS", self.weights_dir, patterns)

    def converted(self, *patterns: str) -> list[Path]:
        """Files of the weights converted for the port; see `weights`."""
        return self._files(
            MissingKind.CONVERTED_WEIGHTS, "CONVERTED_WEIGHTS", self.converted_dir, patterns
        )

    def _folder(self, part: str, default: str | Path | None) -> Path | None:
        given = os.environ.get(self.variable(part)) or default
        return Path(given).expanduser() if given else None

    def _files(
        self, kind: MissingKind, part: str, default: str | Path | None, patterns: Sequence[str]
    ) -> list[Path]:
        variable = self.variable(part)
        folder = self._folder(part, default)
        wanted = patterns or ("*",)
        if folder is None:
            raise missing(
                kind,
                f"{', '.join(wanted)} of {self.name}",
                searched=(f"${variable} (not set)",),
                hint=f"set it: export {variable}=DIR",
            )
        found: list[Path] = []
        for pattern in wanted:
            matches = sorted(path for path in folder.glob(pattern) if path.is_file())
            if not matches:
                raise missing(
                    kind,
                    f"{pattern} in {folder}",
                    searched=(f"${variable} = {os.environ.get(variable, '(not set)')}",),
                    hint=f"set it: export {variable}=DIR",
                )
            found += [path for path in matches if path not in found]
        return found


def _import(spec: str, kind: MissingKind, searched: Sequence[str], *, hint: str = "") -> ModuleType:
    name, colon, attribute = spec.partition(":")
    if not (name and colon and attribute):
        raise UsageError(f"{spec!r} names no class", hint="write it as package.module:Class")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        lacking = error.name or ""
        if name == lacking or name.startswith(f"{lacking}."):
            what = f"module {name} ({attribute})"
            raise missing(kind, what, searched=searched, hint=hint) from error
        foreign = lacking.split(".")[0] != name.split(".")[0]
        if kind is MissingKind.OFFICIAL_IMPORT and lacking and foreign:
            raise missing(
                kind,
                f"module {lacking}, which {name} imports",
                searched=searched,
                hint=f"install {lacking.split('.')[0]}, or stub it: with stub({lacking!r}, ...)",
            ) from error
        raise


def _attribute(module: ModuleType, spec: str, kind: MissingKind) -> Any:
    name = spec.partition(":")[2]
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.3)
        raise missing(
            kind,
            f"class {name} in {module.__name__}",
            searched=tuple(f"{module.__name__} has {other}" for other in near),
        )
    return found

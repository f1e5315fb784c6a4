"""The user's own Python files that an experiment has run: what it goes on with must be the same.

A change may import others when it is loaded, when it is called, or when a model it changed runs.
So the files are those of all modules that are there after each run, from below the working
directory and the folders of the files that were named.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import truestep
from truestep.errors import UsageError
from truestep.files import write_text
from truestep.reading import parse_json, read

NAME = "sources.json"
"""File of the experiment's folder: path, from one of the folders, to a digest."""

_INSTALLED = frozenset({"site-packages", "dist-packages"})
_LIBRARIES = tuple(
    Path(place).resolve() for place in (Path(truestep.__file__).parent, sys.prefix, sys.base_prefix)
)


class Sources:
    """The user's files of one experiment.

    Args:
        named: `file.py:function` of changes and metrics; a name that is none is left out.
    """

    def __init__(self, named: Iterable[str]) -> None:
        files = [Path(spec.rpartition(":")[0]) for spec in named if ".py:" in spec]
        self._named = [file.resolve() for file in files]
        folders = [*(file.parent for file in self._named), Path.cwd().resolve()]
        self._folders = tuple(dict.fromkeys(folders))
        self._digests: dict[str, str] = {}
        self._seen: set[Path] = set()
        self._libraries: set[str] = set()
        self._named_by: dict[str, Path] = {}

    def keep(self, folder: Path) -> None:
        """Write down which files there are now; those that are known keep what they were.

        Raises:
            WriteError: They cannot be written.
        """
        before = len(self._digests)
        for path in self._files():
            if path not in self._seen:
                self._seen.add(path)
                self._digests.setdefault(self._key(path), _digest(path))
        if len(self._digests) > before:
            text = json.dumps(self._digests, indent=1, sort_keys=True)
            write_text(folder / NAME, text, "the list of source files")

    def check(self, folder: Path) -> None:
        """Make sure that the files of a kept experiment are what they were.

        Raises:
            UsageError: One is not, or is gone.
            FileFormatError: The list cannot be read.
        """
        path = folder / NAME
        if not path.exists():
            return
        known = read(path, "the list of source files cannot be read", parse_json)
        self._digests = {str(key): str(digest) for key, digest in dict(known).items()}
        changed = [key for key, digest in self._digests.items() if self._now(key) != digest]
        if changed:
            raise UsageError(
                "the experiment in this folder ran other code: "
                f"{', '.join(changed[:5])} changed since",
                where=str(path),
                hint="give another --output",
            )

    def _files(self) -> Iterator[Path]:
        yield from self._named
        for module in [*sys.modules.values()]:
            file = getattr(module, "__file__", None)
            if not isinstance(file, str) or not file.endswith(".py"):
                continue
            if file in self._libraries:  # thousands: looked up once, not after each run
                continue
            path = os.path.realpath(file)
            if self._is_users(path):
                yield Path(path)
            elif os.path.isfile(path):
                self._libraries.add(file)

    def _is_users(self, path: str) -> bool:
        """Whether a file is the user's: below a folder, and no library's."""
        if _INSTALLED & {*path.split(os.sep)} or _below(path, _LIBRARIES):
            return False
        return _below(path, self._folders) and os.path.isfile(path)

    def _key(self, path: Path) -> str:
        """Its name from the innermost folder: an experiment may be moved with its files."""
        inside = [place for place in self._folders if path.is_relative_to(place)]
        place = max(inside, key=lambda place: len(place.parts))
        key = path.relative_to(place).as_posix()
        return key if self._named_by.setdefault(key, path) == path else path.as_posix()

    def _now(self, key: str) -> str:
        """Digests of the files that may be meant; of several the one that was kept."""
        there = [place / key for place in self._folders if (place / key).is_file()]
        digests = [_digest(path) for path in there]
        kept = self._digests[key]
        return kept if kept in digests else ""


def _below(path: str, folders: Iterable[Path]) -> bool:
    """Whether a path is in one of the folders, however deep; by its text, of thousands."""
    return any(path.startswith(os.path.join(folder, "")) for folder in folders)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

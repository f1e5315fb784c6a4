"""Versions of packages, each put before those of the environment, which stays as it is.

A version is installed alone (`--no-deps`) into a folder of its own, which comes first on
PYTHONPATH: torch and all else are those of the environment. So nothing is downloaded twice, and a
version that needs others of its dependencies fails to import, which is told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from truestep.errors import UsageError
from truestep.experiment.bisecting.changes import same_version
from truestep.experiment.bisecting.identity import content, interpreter_of
from truestep.experiment.bisecting.isolation import Place, Setting, environment
from truestep.experiment.bisecting.store import Store, key_of
from truestep.files import beside

_PATIENCE_S = 1800.0

_INDEXES = (
    "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL",
    "UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL",
)  # fmt: skip
"""Variables that may name a folder as the package index."""

_WHERE = """
import importlib.metadata as m, json, sys
print(json.dumps({n: [m.version(n), str(m.distribution(n).locate_file(""))] for n in sys.argv[1:]}))
"""


def versions(name: str, command: Sequence[str], folder: Path) -> list[str]:
    """Versions that the package index has, newest first.

    Raises:
        UsageError: It cannot be asked, or does not know the package.
    """
    done = _pip(command, folder, "index", "versions", name)
    match = re.search(r"Available versions: (.+)", done.stdout)
    if done.returncode or not match:
        raise UsageError(
            f"the versions of {name} cannot be listed",
            measured=_last(done.stderr),
            likely="the package index cannot be reached, or does not have it",
            hint="write it as NAME==GOOD..BAD, or NAME==A,B,C to name all versions",
        )
    return [text.strip() for text in match[1].split(",")]


def _pip(command: Sequence[str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    quiet = ("--disable-pip-version-check", "--no-input")
    return _done([interpreter_of(command, folder), "-m", "pip", *words, *quiet])


def _done(
    words: Sequence[str], variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program away from the project; one that cannot be run, or does not end, has failed."""
    try:
        return subprocess.run(
            words,
            env=variables,
            cwd=os.sep,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no word of why"])[-1][:200]


@dataclass
class Overlays:
    """Folders of one version each, for the interpreter of a command.

    Attributes:
        again: Whether each is installed anew, the first time that it is needed.
    """

    store: Store
    interpreter: str
    again: bool = False
    _made: set[Path] = field(default_factory=set)

    def key(self, name: str, version: str) -> str:
        """Of a version by its content, as far as its files are on this machine."""
        files = [f"{path} {content(path)}" for path in local_files(name, version)]
        requirement = f"{name}=={version}"
        return key_of([os.path.realpath(self.interpreter), requirement, *files])

    def of(self, name: str, version: str) -> tuple[Path, str]:
        """The folder of a version, and why it could not be made."""
        path = self.store.folder / "overlays" / self.key(name, version)
        if path.is_dir() and (path in self._made or not self.again):
            return path, ""
        with beside(path, "the folder of a package") as temporary:
            fresh = self.again or bool(local_files(name, version))
            done = _installed(f"{name}=={version}", self.interpreter, temporary, fresh=fresh)
            if done.returncode:
                return path, f"{name}=={version} does not install: {_last(done.stderr)}"
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        self._made.add(path)
        return path, ""


def local_files(name: str, version: str) -> list[Path]:
    """Wheels and archives of a version in folders that stand for the package index."""
    told = " ".join(os.environ.get(variable, "") for variable in _INDEXES)
    found: set[Path] = set()
    for word in re.split(r"[\s,]+", told):
        root = Path(url2pathname(urlsplit(word).path)) if word.startswith("file:") else Path(word)
        if word and "://" not in word.removeprefix("file://") and root.is_dir():
            places = (root, root / name, root / _plain(name))
            found.update(path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path for path in found if path.is_file() and _is_of(path.name, name, version))


def _is_of(file: str, name: str, version: str) -> bool:
    stem = re.sub(r"\.(?:whl|tar\.\w+|tgz|zip)$", "", file)
    parts = stem.split("-")[:2] if file.endswith(".whl") else stem.rsplit("-", 1)
    if stem == file or len(parts) != 2 or _plain(parts[0]) != _plain(name):
        return False
    return same_version(re.split(r"[+_]", parts[1])[0], version.partition("+")[0])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setting(
    chosen: Mapping[str, str],
    command: Sequence[str],
    folder: Path,
    *,
    overlays: Overlays,
    kept: Sequence[str],
) -> Setting:
    """A point: these versions of these packages, before all others."""
    names = [f"{name}=={version}" for name, version in chosen.items()]

    @contextmanager
    def place(scratch: Path) -> Iterator[Place]:
        folders, problem = [], ""
        for name, version in chosen.items():
            path, problem = overlays.of(name, version)
            folders.append(str(path))
            if problem:
                break
        before = os.environ.get("PYTHONPATH")
        path_variable = os.pathsep.join([*folders, *([before] if before else [])])
        variables: dict[str, str | None] = {
            "PYTHONPATH": path_variable,
            "TRUESTEP_BISECT_ROOT": str(folder),
        }
        if not problem:
            given = environment(scratch, kept, variables)
            problem = _elsewhere(chosen, folders, command, folder, given)
        yield Place(folder, variables, {"repo": str(folder)}, problem)

    key = key_of(overlays.key(name, version) for name, version in chosen.items())
    return Setting(key=key, label=", ".join(names), place=place)


def _installed(
    requirement: str, interpreter: str, target: Path, *, fresh: bool
) -> subprocess.CompletedProcess[str]:
    """Install one version alone, by uv where it is on PATH, else by pip.

    Args:
        fresh: Whether what the installer itself keeps of it may be of another build.
    """
    uv = shutil.which("uv")
    how = ("--no-deps", "--target", str(target), requirement)
    words = (
        [uv, "pip", "install", "--quiet", "--python", interpreter,
         *(["--refresh"] if fresh else []), *how]
        if uv
        else [interpreter, "-m", "pip", "install", "--quiet", "--no-input",
              *(["--no-cache-dir"] if fresh else []), "--disable-pip-version-check", *how]
    )  # fmt: skip
    return _done(words)


def _elsewhere(
    chosen: Mapping[str, str],
    folders: Sequence[str],
    command: Sequence[str],
    folder: Path,
    variables: dict[str, str],
) -> str:
    """Why a probe would be blind: it would import another version. Empty where not."""
    done = _done([interpreter_of(command, folder), "-c", _WHERE, *chosen], variables)
    if done.returncode:
        return f"the packages cannot be found: {_last(done.stderr)}"
    roots = [Path(each).resolve() for each in folders]
    for name, (version, where) in json.loads(done.stdout).items():
        if not any(Path(where).resolve().is_relative_to(root) for root in roots):
            return f"{name} {version} would be imported from {where}, not {chosen[name]}"
    return ""

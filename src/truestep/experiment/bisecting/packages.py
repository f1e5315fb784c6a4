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
from pathlib import Path

from truestep.errors import UsageError
from truestep.experiment.bisecting.identity import interpreter_of
from truestep.experiment.bisecting.isolation import Place, Setting, environment
from truestep.experiment.bisecting.store import Store, key_of
from truestep.files import beside

_PATIENCE_S = 1800.0

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


def setting(
    chosen: Mapping[str, str],
    command: Sequence[str],
    folder: Path,
    *,
    store: Store,
    kept: Sequence[str],
) -> Setting:
    """A point: these versions of these packages, before all others."""
    names = [f"{name}=={version}" for name, version in chosen.items()]

    @contextmanager
    def place(scratch: Path) -> Iterator[Place]:
        folders, problem = [], ""
        for name in names:
            path, problem = _overlay(name, command, folder, store)
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

    return Setting(key=key_of(names), label=", ".join(names), place=place)


def _overlay(
    requirement: str, command: Sequence[str], folder: Path, store: Store
) -> tuple[Path, str]:
    """The folder of one version, and why it could not be made."""
    interpreter = interpreter_of(command, folder)
    path = store.folder / "overlays" / key_of([os.path.realpath(interpreter), requirement])
    if path.is_dir():
        return path, ""
    with beside(path, "the folder of a package") as temporary:
        done = _installed(requirement, interpreter, temporary)
        if done.returncode:
            return path, f"{requirement} does not install: {_last(done.stderr)}"
        os.replace(temporary, path)
    return path, ""


def _installed(
    requirement: str, interpreter: str, target: Path
) -> subprocess.CompletedProcess[str]:
    """Install one version alone, by uv where it is on PATH, else by pip."""
    uv = shutil.which("uv")
    how = ("--no-deps", "--target", str(target), requirement)
    words = (
        [uv, "pip", "install", "--quiet", "--python", interpreter, *how]
        if uv
        else [interpreter, "-m", "pip", "install", "--quiet", "--no-input",
              "--disable-pip-version-check", *how]
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

"""Judge one change without a frozen reference: the baseline is recorded anew, here and now.

A reference that was kept grows old: torch, a driver or the machine is another one, and what changed
is no longer one thing. Here both sides run in this build, each in a process and with compile caches
of its own: the baseline (a commit in a worktree, or another environment on this code) records, this
working tree is checked against that, and what was recorded is thrown away.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truestep.errors import FileFormatError, ReferenceNotFoundError, TruestepError, UsageError
from truestep.experiment.bisecting.commits import Commit, Line, git, settings
from truestep.experiment.bisecting.isolation import Place, Ran, environment, path_of, run
from truestep.files import alive
from truestep.reading import parse_json, parse_toml, read
from truestep.text import listed, pasteable
from truestep.verdict import Comparison, Results

NAMED = 5
"""Changed files that are named; more are counted."""

_INTERPRETER = re.compile(r"(?:python|pypy)[\d.]*t?(?:\.exe)?")
_PYTHON = ("bin/python", "Scripts/python.exe")
_ERROR = re.compile(r"\b\w*Error: ")
_PARTS = re.compile(r"[:=]")


@dataclass(frozen=True)
class Baseline:
    """What is trusted.

    Attributes:
        label: In words.
        python: The interpreter that records it.
        commit: Of a revision, else None: an environment.
        repository: Of the working tree, if it is in one.
    """

    label: str
    python: str
    commit: Commit | None = None
    repository: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What is recorded and checked.

    Attributes:
        folder: Where both commands begin.
        words: Arguments and options that choose cases.
        files: Case files that they are read from.
        options: Of the check alone.
        floor: Of the recording.
        told: What is done now, as (what, done, of).
    """

    folder: Path
    words: Sequence[str]
    files: Sequence[Path]
    options: Sequence[str] = ()
    floor: str = "steps"
    told: Callable[[str, int, int], None] | None = None


def baseline_of(text: str, folder: Path) -> Baseline:
    """A revision of the repository that a folder is in, or a Python environment.

    Args:
        text: A path of an environment's folder or of its interpreter, else a revision.
        folder: Where the user is.

    Raises:
        UsageError: It is neither.
    """
    repository = _repository(folder)
    path = folder / text
    python = next((path / name for name in _PYTHON if (path / name).is_file()), None)
    if python is None and _INTERPRETER.fullmatch(path.name) and os.access(path, os.X_OK):
        python = path
    if python is not None:  # not resolved: a link in an environment says which one it is
        return Baseline(f"environment {text}", os.path.abspath(python), repository=repository)
    if repository is None:
        raise UsageError(
            "the baseline is no Python environment, and this folder is in no git repository",
            where=f"--baseline {text}",
            hint="git status",
        )
    try:
        told = git(repository, "rev-parse", "--verify", "--end-of-options", f"{text}^{{commit}}")
        sha = told.split()[-1]
        tree = git(repository, "rev-parse", f"{sha}^{{tree}}").strip()
        subject = git(repository, "log", "--max-count=1", "--format=%s", sha).strip()
    except UsageError as error:
        raise UsageError(
            "the baseline is no commit of this repository, and no Python environment",
            where=f"--baseline {text}",
            measured=error.measured,
            hint="git log --oneline --max-count 5",
        ) from None
    commit = Commit(sha, tree, (), subject)
    return Baseline(f"{text} ({commit.label})", sys.executable, commit, repository)


def judged(baseline: Baseline, asked: Asked) -> list[Comparison]:
    """Record the baseline, check this working tree against it, and throw the recording away.

    Raises:
        UsageError: The baseline's code would not be what runs.
        ReferenceNotFoundError: The baseline could not be recorded.
        FileFormatError: The check gave no result.
    """
    _sweep(baseline)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as name:
        scratch = Path(name)
        _say(asked, "recording the baseline", 0)
        kept = _recorded(baseline, asked, scratch)
        _say(asked, "checking the working tree", 1)
        results = _checked(baseline, asked, scratch)
        _say(asked, "checking the working tree", 2)
    notes = (*_single(baseline), *kept)
    return [_told(result, baseline, notes) for result in results]


_SCRATCH = "truestep-baseline-"


def _sweep(baseline: Baseline) -> None:
    """Clear away what a gate left that was killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        number = left.name.removeprefix(_SCRATCH).partition("-")[0]
        # elsewhere signal 0 is not a question
        if number.isdigit() and os.name == "posix" and not alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    if baseline.repository is not None:
        git(baseline.repository, "worktree", "prune")


def _say(asked: Asked, what: str, done: int) -> None:
    if asked.told is not None:
        asked.told(what, done, 2)


def _recorded(baseline: Baseline, asked: Asked, scratch: Path) -> list[str]:
    """Record the baseline; what both sides share although a commit lacks it."""
    asked = replace(asked, words=[_relative(word, baseline, asked.folder) for word in asked.words])
    words = ["record", *asked.words, "--references", str(scratch / "references")]
    words += ["--floor", asked.floor]
    with _place(baseline, asked, scratch) as (place, shared):
        if place.problem:
            raise UsageError(
                "the baseline would not run its own code",
                where=baseline.label,
                measured=place.problem,
                hint="install the project in this environment in editable mode: pip install -e .",
            )
        ran = _run(baseline.python, words, place, scratch / "baseline")
        _require_own_code(baseline, scratch)
    if ran.exit_code and any((scratch / "references").rglob("*.safetensors")):
        return [*shared, f"of the baseline not all could be recorded: {_last(ran)}"]
    if ran.exit_code:
        raise ReferenceNotFoundError(
            "the baseline could not be recorded",
            where=baseline.label,
            measured=_last(ran),
            hint=f"truestep {pasteable(words[:-4])}  # in the baseline",
        )
    return shared


def _relative(word: str, baseline: Baseline, folder: Path) -> str:
    """A word that names a file of the repository by its whole path, as from the folder: that is
    another one in a worktree."""
    name, mark, path = word.partition("=") if "=" in word else ("", "", word)
    if baseline.commit is None or baseline.repository is None or not os.path.isabs(path):
        return word
    plain = path.rpartition(":")[0] or path
    if not Path(plain).resolve().is_relative_to(baseline.repository.resolve()):
        return word
    rest = path.removeprefix(plain)
    return f"{name}{mark}{os.path.relpath(plain, folder)}{rest}"


@contextmanager
def _place(baseline: Baseline, asked: Asked, scratch: Path) -> Iterator[tuple[Place, list[str]]]:
    """Where the baseline runs, and notes on files that are the same on both sides."""
    if baseline.commit is None or baseline.repository is None:
        yield _here(baseline, asked.folder), []
        return
    line = Line(baseline.repository, (baseline.commit,))
    command = [baseline.python, "-m", "truestep"]
    (setting,) = settings(line, command, folder=asked.folder, names=(), kept=())
    folder = scratch / "commit"
    folder.mkdir()
    with setting.place(folder) as place:
        tree = folder / "tree"
        here = tree / asked.folder.resolve().relative_to(baseline.repository.resolve())
        here.mkdir(parents=True, exist_ok=True)  # a folder that is new is in no commit
        yield replace(place, folder=here), [*_shared(baseline.repository, tree, asked)]


def _here(baseline: Baseline, folder: Path) -> Place:
    """The working tree itself, its packages first."""
    root = baseline.repository or folder
    return Place(folder, {"PYTHONPATH": path_of(root)})


def _checked(baseline: Baseline, asked: Asked, scratch: Path) -> tuple[Comparison, ...]:
    """Check the working tree against what was recorded."""
    path = scratch / "results.json"
    words = ["check", *asked.words, "--references", str(scratch / "references"), "--remade"]
    words += [*asked.options, "--json", str(path)]
    ran = _run(sys.executable, words, _here(baseline, asked.folder), scratch / "candidate")
    if not path.exists():
        raise FileFormatError(
            "the working tree could not be checked",
            where=str(asked.folder),
            measured=_last(ran),
            hint=f"truestep {pasteable(['check', *asked.words])} --dry-run",
        )
    return read(path, "the result of the check cannot be read", _results).comparisons


def _results(text: bytes) -> Results:
    return Results.model_validate(parse_json(text))


def _run(python: str, words: Sequence[str], place: Place, scratch: Path) -> Ran:
    """Run truestep; the files that it imported are written into `scratch`."""
    scratch.mkdir()
    variables = environment(scratch, (), place.variables)
    command = [python, "-c", _PROGRAM, str(scratch / _IMPORTED), *words]
    return run(command, place.folder, variables, scratch=scratch, timeout_s=None)


_IMPORTED = "imported"
_PROGRAM = """
import atexit, runpy, sys
path = sys.argv.pop(1)
sys.argv[0] = "truestep"
def write():
    modules = [*sys.modules.values()]
    names = [getattr(m, "__file__", None) for m in modules]
    names += [getattr(getattr(m, "__spec__", None), "origin", None) for m in modules]
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\\0".join(name for name in names if isinstance(name, str)))
atexit.register(write)
runpy.run_module("truestep", run_name="__main__", alter_sys=True)
"""


def _require_own_code(baseline: Baseline, scratch: Path) -> None:
    """Refuse a baseline that imported files of the working tree: it would be compared with itself.

    Raises:
        UsageError: It did.
    """
    written = scratch / "baseline" / _IMPORTED
    if baseline.commit is None or baseline.repository is None:
        return
    if not written.exists():
        raise UsageError(
            "the baseline did not say what it imported: it may not be its own code",
            where=baseline.label,
            likely="it was ended while it ran",
        )
    root, tree = baseline.repository.resolve(), (scratch / "commit" / "tree").resolve()
    told = git(baseline.repository, "ls-files", "--recurse-submodules", "-z")
    tracked = {str(root / name) for name in told.split("\0") if name}
    names = written.read_text("utf-8", "surrogateescape").split("\0")
    found = (os.path.realpath(name) for name in names if os.path.isabs(name))
    own = sorted({name for name in found if name in tracked and not name.startswith(f"{tree}/")})
    if own:
        raise UsageError(
            "the baseline would not run its own code",
            where=baseline.label,
            measured=f"it imported {own[0]} of the working tree",
            hint="name folders of packages relative to the folder that it runs in",
        )


def _last(ran: Ran) -> str:
    """What a command said of why it failed."""
    lines = [line.strip() for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
    said = [line for line in lines if _ERROR.search(line)] or lines[-1:]
    return said[0][:300] if said else f"exit code {ran.exit_code}"


def _shared(repository: Path, tree: Path, asked: Asked) -> Iterator[str]:
    """Give a worktree the case files of the working tree, and what they name that no commit has."""
    root = repository.resolve()
    for path in asked.files:
        where = (asked.folder / path).resolve()
        if not where.is_file():
            continue
        if not where.is_relative_to(root):
            yield f"{path} is in no commit: what it names is the same on both sides"
            continue
        there = tree / where.relative_to(root)
        content = where.read_bytes()
        if not there.is_file() or there.read_bytes() != content:
            _make_room(there, tree)
            there.write_bytes(content)
            yield f"{path} of the working tree says the cases of both sides"
        yield from _linked(_texts(where), where.parent, root, tree)
    yield from _linked(asked.words, asked.folder.resolve(), root, tree)


def _make_room(path: Path, tree: Path) -> None:
    """Make the folder of a file in a worktree, and take away what is in its place.

    Raises:
        UsageError: A link of the commit leads out of the worktree there.
    """
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.resolve().is_relative_to(tree.resolve()):
        raise UsageError(
            "a link in the commit leads out of it, where a file of the working tree belongs",
            where=str(path.relative_to(tree)),
            hint="git ls-files --stage  # mode 120000 is a link",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)


def _texts(path: Path) -> list[str]:
    """Every text in a case file; none where it cannot be read: then the check says so."""
    try:
        return [*_leaves(read(path, "the case file cannot be read", parse_toml))]
    except TruestepError:
        return []


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)


def _linked(texts: Sequence[str], folder: Path, root: Path, tree: Path) -> Iterator[str]:
    """Link files of the working tree that texts name and a commit lacks: weights, pictures.

    Raises:
        UsageError: A text names a file of the commit by its whole path, which is the working
            tree's on both sides.
    """
    for text in texts:
        for part in dict.fromkeys((text, *_PARTS.split(text))):
            try:
                found = (folder / part).resolve() if part.strip("./") else folder
                there = tree / found.relative_to(root)
                if found in (folder, root) or not found.exists():
                    continue
            except (OSError, ValueError):  # no path, or not of the repository
                continue
            if os.path.isabs(part) and there.exists():
                raise UsageError(
                    "a file of the repository is named by its whole path: both sides would have it",
                    where=part,
                    hint="name it from the folder of the case file",
                )
            if list(_lacking(found, there, tree)):
                yield f"{part} is in no commit, or not whole: both sides have this one"


def _lacking(found: Path, there: Path, tree: Path) -> Iterator[Path]:
    """Link what a worktree lacks of a file or a folder; what was linked."""
    if there.is_symlink() or found.is_file():
        if not there.exists():
            _make_room(there, tree)
            there.symlink_to(found)
            yield there
    elif not there.exists():
        _make_room(there, tree)
        there.symlink_to(found, target_is_directory=True)
        yield there
    else:
        for inner in sorted(found.iterdir()):
            if inner.name != ".git":
                yield from _lacking(inner, there / inner.name, tree)


def _single(baseline: Baseline) -> list[str]:
    """What differs between the two sides, in words."""
    if baseline.commit is None or baseline.repository is None:
        return [f"both sides run this code; the baseline in {baseline.label}"]
    names = _changed(baseline.repository, baseline.commit.sha)
    if not names:
        return [f"nothing differs between {baseline.label} and the working tree"]
    return [f"changed since {baseline.label}: {listed(names, NAMED)}"]


def _changed(repository: Path, sha: str) -> list[str]:
    """Files of the working tree that are others than in a commit, new ones too."""
    told = git(repository, "diff", "--name-only", "-z", sha, "--")
    new = git(repository, "ls-files", "--others", "--exclude-standard", "-z")
    return [name for name in (told + new).split("\0") if name]


def _repository(folder: Path) -> Path | None:
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
    except UsageError:
        return None


def _told(result: Comparison, baseline: Baseline, notes: Sequence[str]) -> Comparison:
    """A result that says what the baseline was, without paths that are gone."""
    reference = result.reference.model_copy(update={"label": baseline.label, "path": None})
    actual = result.actual
    if actual.label == "unchanged":
        actual = actual.model_copy(update={"label": "working tree"})
    failed = not result.verdict.passed and baseline.commit is not None
    hint = f"git diff {baseline.commit.short}" if failed and baseline.commit else ""
    return result.model_copy(
        update={
            "actual": actual,
            "reference": reference,
            "notes": (*notes, *result.notes),
            "hint": hint,
            "repeat": "",
        }
    )

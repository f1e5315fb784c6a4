"""Commits of a git repository as points: in a line, each in a worktree of its own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from truestep.errors import FileFormatError, UsageError
from truestep.experiment.bisecting.identity import imported_from
from truestep.experiment.bisecting.isolation import Place, Setting, environment, kill_of, path_of
from truestep.reading import parse_toml, read
from truestep.text import pasteable, quoted

_MOST_NAMES = 200

_HASH = 12
"""Letters of a commit's hash that are printed."""


@dataclass(frozen=True)
class Commit:
    """A commit.

    Attributes:
        sha, tree: Hashes of it and of its content.
        parents: Hashes of its parents; two and more are a merge.
    """

    sha: str
    tree: str
    parents: tuple[str, ...]
    subject: str

    @property
    def short(self) -> str:
        """Its hash, shorter."""
        return self.sha[:_HASH]

    @property
    def label(self) -> str:
        """Hash and subject."""
        return f"{self.short} {self.subject!r}"


@dataclass(frozen=True)
class Line:
    """Commits from the good end to the bad one, along first parents."""

    repository: Path
    points: tuple[Commit, ...]
    notes: tuple[str, ...] = ()


def git(repository: Path, *words: str) -> str:
    """What git prints.

    Raises:
        UsageError: It fails; its own words are in the message.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in _KEPT}
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *words],
            env={**variables, "LC_ALL": "C.UTF-8", "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError("commits need git, which is not installed") from None
    if done.returncode:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UsageError(
            "git could not do what the bisect needs",
            where=pasteable(["git", *words[:4]]),
            measured=told[-1] if told else f"exit {done.returncode}",
        )
    return done.stdout.decode("utf-8", "replace")  # as it is: a subject may hold any line break


_KEPT = ("GIT_SSH", "GIT_SSH_COMMAND", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_EXEC_PATH")


def line_of(folder: Path, good: str, bad: str) -> Line:
    """The line between two revisions.

    A good end that the bad one does not descend from (a tag on a branch of its own) is stood for by
    the newest commit that both have.

    Raises:
        UsageError: There is no repository, no such revision, or no suspect between the two.
    """
    repository = Path(git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
    first, last = (_commit(repository, name, end) for name, end in ((good, "good"), (bad, "bad")))
    if first == last:
        raise UsageError(
            "both ends are the same commit",
            where=first[:_HASH],
            hint="git log --oneline --max-count 5",
        )
    base = _base(repository, first, last)
    if base == last:
        raise UsageError(
            "the bad end is older than the good one: there is no commit between them",
            where=f"{good} has all of {bad}",
            hint=f"--good {quoted(bad)} --bad {quoted(good)}",
        )
    notes = []
    if base != first:
        notes.append(
            f"{good} is on another branch: {base[:_HASH]}, the newest commit that both have, is "
            "the good end"
        )
    form = "--format=%H%x00%T%x00%P%x00%s"
    lines = git(repository, "log", "--first-parent", "--reverse", form, f"{base}..{last}")
    start = git(repository, "log", "--max-count=1", form, base)
    points = tuple(_parsed(line) for line in f"{start}{lines}".split("\n") if line)
    if points[1].parents[:1] != (base,):
        notes.append(
            f"the good end came in by the merge {points[1].short}: other commits of that merge are "
            "judged together"
        )
    notes += _notes(repository)
    return Line(repository, points, tuple(notes))


def _commit(repository: Path, name: str, end: str) -> str:
    try:
        text = git(repository, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except UsageError as error:
        raise UsageError(
            f"the {end} end is no commit of this repository",
            where=f"--{end} {name}",
            measured=error.measured,
            hint="git log --oneline --max-count 5",
        ) from None
    return text.split()[-1]


def _base(repository: Path, first: str, last: str) -> str:
    try:
        return git(repository, "merge-base", first, last).split()[0]
    except UsageError:
        shallow = git(repository, "rev-parse", "--is-shallow-repository").strip() == "true"
        raise UsageError(
            "the two ends have no commit in common",
            likely="the repository was cloned in part" if shallow else "",
            hint="git fetch --unshallow" if shallow else "git log --oneline --max-count 5",
        ) from None


def _parsed(line: str) -> Commit:
    sha, tree, parents, subject = line.split("\0")
    return Commit(sha, tree, tuple(parents.split()), subject)


SHARED = "shared by all probes: weights (HF_HOME, TORCH_HOME), settings of programs, the GPU"


def _notes(repository: Path) -> Iterator[str]:
    if git(repository, "status", "--porcelain", "--untracked-files=no").strip():
        yield "what is not committed is in no probe"
    empty = [
        name for name, _ in _submodules(repository, "HEAD") if not _is_there(repository / name)
    ]
    if empty:
        names = ", ".join(empty)
        yield f"empty in probes, as here: submodule {names} (git submodule update --init)"
    yield SHARED


def settings(
    line: Line, command: Sequence[str], *, folder: Path, names: Sequence[str], kept: Sequence[str]
) -> list[Setting]:
    """The points of a line, each to be made ready in a worktree.

    Args:
        command: That is probed, to find its interpreter.
        folder: In the repository; the command runs at the same one of the worktree.
        names: Packages that it must import from the worktree; those of pyproject.toml if there
            are none.
        kept: Variables that are left as they are.
    """
    start = folder.resolve()
    inside = start.relative_to(line.repository) if start.is_relative_to(line.repository) else Path()

    def of(commit: Commit) -> Setting:
        @contextmanager
        def place(scratch: Path) -> Iterator[Place]:
            with ExitStack() as stack:
                try:
                    tree = stack.enter_context(
                        _worktree(line.repository, commit.sha, scratch / "tree")
                    )
                except UsageError as error:
                    yield Place(scratch, problem=f"git cannot check it out: {error.measured}")
                    return
                made = _place(tree, inside, line.repository)
                variables = environment(scratch, kept, made.variables)
                problem = _imports(tree, made, command, names, variables)
                yield Place(made.folder, made.variables, made.words, problem)

        return Setting(key=commit.tree, label=commit.label, place=place)

    return [of(commit) for commit in line.points]


def _place(tree: Path, inside: Path, repository: Path) -> Place:
    folder = tree / inside
    return Place(
        folder if folder.is_dir() else tree,
        {
            "PYTHONPATH": path_of(tree),
            "TRUESTEP_BISECT_ROOT": str(repository),
        },
        {"repo": str(repository), "tree": str(tree)},
    )


@contextmanager
def _worktree(repository: Path, sha: str, path: Path) -> Iterator[Path]:
    """A commit, checked out without hooks into a folder of its own, and its submodules in it."""
    hooks = ("-c", "core.hooksPath=/dev/null")
    git(repository, *hooks, "worktree", "add", "--detach", "--force", "--quiet", str(path), sha)
    try:
        with ExitStack() as stack:
            for name, commit in _submodules(repository, sha):
                if _is_there(repository / name):
                    stack.enter_context(_worktree(repository / name, commit, path / name))
            yield path
    finally:
        _forget(repository, path)


def _submodules(repository: Path, sha: str) -> Iterator[tuple[str, str]]:
    """Folder and commit of each submodule of a commit."""
    for entry in git(repository, "ls-tree", "-r", "-z", "--full-tree", sha).split("\0"):
        kind, _, name = entry.partition("\t")
        if kind.startswith(_SUBMODULE):
            yield name, kind.split()[2]


_SUBMODULE = "160000 "
"""Mode of an entry of a tree that is a commit of another repository."""


def _is_there(submodule: Path) -> bool:
    """Whether a submodule was cloned: without its own `.git`, git would take the one around it."""
    return (submodule / ".git").exists()


def _forget(repository: Path, path: Path) -> None:
    """Remove a worktree, a locked one, too: git locks one that it was killed in making."""
    with suppress(UsageError):
        git(repository, "worktree", "remove", "--force", "--force", str(path))
    shutil.rmtree(path, ignore_errors=True)


def package_names(tree: Path) -> list[str]:
    """Packages that pyproject.toml is about and that are in a tree."""
    source = tree / "src" if (tree / "src").is_dir() else tree
    try:
        content = read(tree / "pyproject.toml", "pyproject.toml cannot be read", parse_toml)
    except FileFormatError:
        return []
    project = content.get("project") if isinstance(content, dict) else None
    name = project.get("name") if isinstance(project, dict) else None
    if not isinstance(name, str):
        return []
    name = re.sub(r"[-.]+", "_", name)
    names = dict.fromkeys((name, name.lower()))
    return [each for each in names if _held(source, each)][:1]


def blind(repository: Path, command: Sequence[str]) -> dict[str, str]:
    """Packages of a repository that the command would import from its working tree, not from a
    worktree, with their file: those in a folder that is not put on PYTHONPATH."""
    listed = git(repository, "ls-files", "-z").split("\0")
    files = [Path(name) for name in listed if Path(name).name == "__init__.py"]
    folders = {file.parent for file in files}
    names = sorted({f.name for f in folders if f.name.isidentifier() and f.parent not in folders})
    made = _place(repository, Path(), repository)
    inside = Path("src") if (repository / "src").is_dir() else Path()
    variables = {**os.environ, "PYTHONPATH": str(made.variables["PYTHONPATH"])}
    found = imported_from(names[:_MOST_NAMES], command, repository, variables)
    of_tree = {(repository / file).resolve() for file in files if file.parent.parent != inside}
    return {name: at for name, at in found.items() if at and Path(at).resolve() in of_tree}


def _held(source: Path, name: str) -> bool:
    return (source / name).is_dir() or (source / f"{name}.py").is_file()


def _imports(
    tree: Path,
    place: Place,
    command: Sequence[str],
    names: Sequence[str],
    variables: dict[str, str],
) -> str:
    """Why a probe would be blind: it would import the project from elsewhere. Empty where not."""
    wanted = list(names) or package_names(tree)
    if not wanted:
        return ""
    real = tree.resolve()
    for name, origin in imported_from(wanted, command, place.folder, variables).items():
        if not origin:
            return f"{name} cannot be found: the worktree does not hold it"
        if not Path(origin).resolve().is_relative_to(real):
            return f"{name} would be imported from {origin}, not from the worktree"
    return ""


@contextmanager
def scratch_folder(repository: Path) -> Iterator[Path]:
    """A folder for probes. What a killed bisect of this repository left goes first: it is called
    with the project locked, so that no other one has such a folder."""
    mark = hashlib.sha256(str(repository).encode()).hexdigest()[:8]
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"truestep-bisect-{mark}-*"):
        for probe in left.glob("*"):
            kill_of(probe)
        for tree in left.glob("*/tree"):
            _forget(repository, tree)
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"truestep-bisect-{mark}-"))
    try:
        if (repository / ".git").exists():
            git(repository, "worktree", "prune")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def files_changed(repository: Path, before: str, after: str) -> tuple[str, ...]:
    """Files that differ between two commits."""
    told = git(repository, "diff", "--name-only", "-z", before, after)
    return tuple(name for name in told.split("\0") if name)

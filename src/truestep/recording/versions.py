"""What git knows: who works here, at which commit, and which contents any lock file ever named."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from truestep.errors import UsageError
from truestep.recording.lock import LOCK_FILE

TIMEOUT_S = 120.0
_HASH = re.compile(rb"\b[0-9a-f]{64}\b")


def _git(folder: Path, *words: str, given: bytes = b"") -> bytes | None:
    """What git says; None where it says no, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            input=given,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _line(folder: Path, *words: str) -> str:
    return (_git(folder, *words) or b"").decode("utf-8", "replace").strip()


def who(folder: Path) -> str:
    """Name and address as git has them, or the name of the user."""
    name, mail = (_line(folder, "config", key) for key in ("user.name", "user.email"))
    if name:
        return f"{name} <{mail}>" if mail else name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return "unknown"


def commit(folder: Path) -> str | None:
    """The commit of the code here, `-dirty` where a file of it is changed; None outside of git."""
    head = _line(folder, "rev-parse", "HEAD")
    if not re.fullmatch(r"[0-9a-f]{40,64}", head):
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") or b""
    files = [line[3:].strip('"') for line in changed.decode("utf-8", "replace").splitlines()]
    dirty = any(not file.endswith(LOCK_FILE) for file in files)
    return head + ("-dirty" if dirty else "")


def in_git(folder: Path) -> bool:
    """Whether a folder is in a repository."""
    return _line(folder, "rev-parse", "--is-inside-work-tree") == "true"


def named_in_git(folder: Path) -> set[str]:
    """Every hash in any version of any lock file that the repository has: of all branches, tags,
    stashes, the index, commits that only a reflog still knows, and other work trees.

    Texts are searched, not parsed: a version with a merge conflict in it names contents, too.

    Raises:
        UsageError: The repository is shallow, or git fails: there may be more than is seen.
    """
    if _line(folder, "rev-parse", "--is-shallow-repository") == "true":
        raise UsageError(
            "the repository is shallow: what its other commits need is not known here",
            where=str(folder),
            hint="git fetch --unshallow",
        )
    top = Path(_line(folder, "rev-parse", "--show-toplevel") or folder)
    wild = f":(top,glob)**/{LOCK_FILE}"
    # All objects, by their names: a pattern would make rev-list leave out trees, and what is below.
    listed = _git(top, "rev-list", "--all", "--reflog", "--objects")
    index = _git(top, "ls-files", "--stage", "--", wild)
    trees = _git(top, "worktree", "list", "--porcelain")
    if listed is None or index is None or trees is None:
        raise UsageError(
            "git does not say which contents other commits need",
            where=str(top),
            hint="git fsck",
        )
    blobs = [
        line.split(" ")[0]
        for line in listed.decode("utf-8", "replace").splitlines()
        if line.endswith(LOCK_FILE)
    ]
    blobs += [line.split()[1] for line in index.decode("utf-8", "replace").splitlines()]
    content = _git(top, "cat-file", "--batch", given="\n".join(blobs).encode() + b"\n")
    if blobs and content is None:
        raise UsageError("git cannot read the lock files of other commits", hint="git fsck")
    found = {sha.decode() for sha in _HASH.findall(content or b"")}
    folders = [Path(line[9:]) for line in trees.decode().splitlines() if line[:9] == "worktree "]
    return found | named_in_folders(folders)


def named_in_folders(folders: Sequence[Path]) -> set[str]:
    """Every hash in the lock files below folders, as they are now."""
    found: set[str] = set()
    for folder in folders:
        for path in folder.rglob(LOCK_FILE) if folder.is_dir() else ():
            found |= {sha.decode() for sha in _HASH.findall(path.read_bytes())}
    return found

"""What decides a verdict and is not what it was: nothing loosens unseen. No torch.

Known failures, thresholds, references, cases and tests are files that a change of code can change
along with the code. Each is compared with the promoted state: the commit that this work began at,
as git knows it. Without git nothing is said.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.reading import parse_json, parse_toml
from truestep.records import RuleChange, RuleKind

_TIMEOUT_S = 20
_LETTERS = 200
_GONE = "(not there)"
_OF = ": "
"""Between a test, or a case, and what is said of it."""
_OF_A_TEST = re.compile(r"(^|::)[Tt]est\w*($|: )|: ")
"""A test, or what is said of anything: not a function that helps tests."""

_MARKS = ("skip", "skipif", "xfail", "parity")
_LIMITS = ("tolerance", "threshold", "coverage", "scope", "expect", "strict")
"""Parts of the names of keywords by which a test says how it judges."""


@dataclass(frozen=True)
class Promoted:
    """The state that is compared with.

    Attributes:
        commit: Its hash. folder: of the repository.
    """

    commit: str
    folder: Path


def promoted(folder: Path, *, since: str = "", environment: Mapping[str, str]) -> Promoted | None:
    """The commit that this work began at; None where git does not tell.

    Args:
        folder: In the repository.
        since: A revision; empty for the merge base with the branch that this is to go to: that of
            a pull request (`GITHUB_BASE_REF`), of a merge request
            (`CI_MERGE_REQUEST_DIFF_BASE_SHA`), or the default branch of `origin`, else HEAD.
    """
    base = environment.get("GITHUB_BASE_REF")
    named = f"origin/{base}" if base else environment.get("CI_MERGE_REQUEST_DIFF_BASE_SHA")
    for revision in [since] if since else [named] if named else ["origin/HEAD", "HEAD"]:
        parse = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        commit = _git(folder, *parse)
        if commit is None:
            continue
        found = commit.decode().strip()
        merged = None if since else _git(folder, "merge-base", "HEAD", found)
        return Promoted(merged.decode().strip() if merged else found, folder)
    return None


def rule_changes(files: Iterable[tuple[RuleKind, Path]], state: Promoted) -> tuple[RuleChange, ...]:
    """What the files say now and did not say in the promoted state.

    What only tightens is left out where that is sure: a known failure that went, a test, a case or
    a reference that came.
    """
    return tuple(change for kind, path in files for change in _changes(kind, path, state))


def _changes(kind: RuleKind, path: Path, state: Promoted) -> Iterator[RuleChange]:
    before_text = _git(path.parent, "cat-file", "blob", f"{state.commit}:./{path.name}")
    now_text = path.read_bytes() if path.is_file() else None
    if now_text == before_text or (before_text is None and kind != "known failure"):
        return
    values = _READERS[kind]
    now = {} if now_text is None else _valued(values, now_text)
    before = {} if before_text is None else _valued(values, before_text)
    for key in sorted({*now, *before}):
        was, is_now = before.get(key), now.get(key)
        came, went = was is None, is_now is None
        new = came and key.partition(_OF)[0] not in before  # a test or case with all that is its
        helper = went and kind == "test" and not _OF_A_TEST.search(key)
        tightens = {"known failure": went, "threshold": False}.get(kind, new or helper)
        if was != is_now and not tightens:
            yield RuleChange(
                kind=kind,
                file=str(path),
                key=key[:_LETTERS],
                actual=(_GONE if is_now is None else is_now)[:_LETTERS],
                reference=(_GONE if was is None else was)[:_LETTERS],
            )


def _valued(values: Callable[[bytes], dict[str, str]], text: bytes) -> dict[str, str]:
    try:
        return values(text)
    except (ValueError, SyntaxError, RecursionError):
        return {"": "cannot be read"}


def _entries(text: bytes) -> dict[str, str]:
    """Known failures: what each states is one value."""
    tables = parse_toml(text).get("known", {})
    return {f"known.{name}": _said(entry) for name, entry in tables.items()}


def _cases(text: bytes) -> dict[str, str]:
    """Cases: every value, and that each is there."""
    found: dict[str, str] = {}
    for name, values in parse_toml(text).get("case", {}).items():
        found[f"case.{name}"] = "there"
        found |= {f"case.{name}{_OF}{key}": value for key, value in _flat(values)}
    return found


def _thresholds(text: bytes) -> dict[str, str]:
    return dict(_flat(parse_json(text)))


def _references(text: bytes) -> dict[str, str]:
    entries = parse_json(text).get("references", {})
    return {str(name): str(entry.get("sha256"))[:16] for name, entry in entries.items()}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every value that is no table."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)


def _said(entry: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in _flat(entry))


def _tests(text: bytes) -> dict[str, str]:
    """Tests of a file: that each is there, its markers, and what limits its checks have."""
    found: dict[str, str] = {}
    for name, node in _named(ast.parse(text)):
        marks = [ast.unparse(mark) for mark in _marks(node)]
        limits = [] if isinstance(node, ast.Module | ast.ClassDef) else [*_limits(node)]
        found[name] = "there"
        if marks or limits:
            found[f"{name}{_OF}judged by"] = "; ".join([*marks, *limits])
    return found


def _named(tree: ast.AST, around: str = "") -> Iterator[tuple[str, ast.AST]]:
    if isinstance(tree, ast.Module):
        yield "(module)", tree
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{around}{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _named(node, f"{name}::")


def _marks(node: ast.AST) -> Iterator[ast.expr]:
    """Markers of a test or a class, and `pytestmark` of a class or a file."""
    given = list(getattr(node, "decorator_list", []))
    for statement in getattr(node, "body", []) if not _is_function(node) else []:
        if isinstance(statement, ast.Assign) and "pytestmark" in map(
            ast.unparse, statement.targets
        ):
            given.append(statement.value)
    for mark in given:
        if any(isinstance(n, ast.Attribute) and n.attr in _MARKS for n in ast.walk(mark)):
            yield mark


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _limits(node: ast.AST) -> Iterator[str]:
    """What the calls in a test say of how they judge, and where it skips or expects to fail."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            for keyword in inner.keywords:
                if keyword.arg and any(part in keyword.arg for part in _LIMITS):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
            if isinstance(inner.func, ast.Attribute) and inner.func.attr in ("skip", "xfail"):
                yield ast.unparse(inner)


_READERS: dict[RuleKind, Callable[[bytes], dict[str, str]]] = {
    "known failure": _entries,
    "threshold": _thresholds,
    "reference": _references,
    "case": _cases,
    "test": _tests,
}


def _git(folder: Path, *words: str) -> bytes | None:
    """What git says in a folder; None where it cannot."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(
            command,
            cwd=folder if folder.is_dir() else ".",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout if done.returncode == 0 else None

"""What decides a verdict and is not what it was: nothing loosens unseen. No torch.

Known failures, thresholds, references, cases and tests are files that a change of code can change
along with the code. Each is compared with the promoted state: the commit that this work began at,
as git knows it. Without git nothing is said.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import zlib
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

_OF_ALL = "pytest "
"""How a key begins that decides for all tests: an option, a hook."""

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
    before_text = text_then(state, path)
    now_text = path.read_bytes() if path.is_file() else None
    values = _reader(kind, path)
    alone = kind in ("known failure", "threshold") or values in (_settings, _hooks)
    came_alone = before_text is None and not alone
    if now_text == before_text or came_alone:
        return
    now = {} if now_text is None else _valued(values, now_text)
    before = {} if before_text is None else _valued(values, before_text)
    for key in sorted({*now, *before}):
        was, is_now = before.get(key), now.get(key)
        came, went = was is None, is_now is None
        new = came and key.partition(_OF)[0] not in before  # a test or case with all that is its
        helper = went and kind == "test" and not _OF_A_TEST.search(key)
        tightens = {"known failure": went, "threshold": False}.get(kind, new or helper)
        tightens = tightens and not key.startswith(_OF_ALL)
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
    except (
        ValueError,
        SyntaxError,
        RecursionError,
        AttributeError,
        TypeError,
        configparser.Error,
    ):
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


def _settings(text: bytes) -> dict[str, str]:
    """What pytest reads in a file of settings, whichever kind it is."""
    try:
        tables = parse_toml(text)
        read = tables.get("tool", {}).get("pytest", {})
        options = {
            **read.get("ini_options", {}),
            **{k: v for k, v in read.items() if k != "ini_options"},
        }
        options |= tables.get("pytest", {}) if "pytest" in tables else {}
    except ValueError:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text.decode("utf-8"))
        options = {}
        for section in ("pytest", "tool:pytest"):
            options |= dict(parser[section]) if parser.has_section(section) else {}
    return {f"{_OF_ALL}{key}": " ".join(str(value).split()) for key, value in options.items()}


def _hooks(text: bytes) -> dict[str, str]:
    """What a `conftest.py` does to the tests of its folder: hooks, fixtures, what it leaves out."""
    found: dict[str, str] = {}
    for node in ast.parse(text).body:
        for name in _defined(node):
            kept = isinstance(node, ast.Assign | ast.AnnAssign) and name.startswith(
                "collect_ignore"
            )
            if kept or name in ("pytestmark", "pytest_plugins"):
                found[f"{_OF_ALL}{name}"] = ast.unparse(node)
            elif _is_fixture(node) or (_is_function(node) and name.startswith("pytest_")):
                found[f"{_OF_ALL}{name}"] = _marked(node)
    return found


def _marked(node: ast.AST) -> str:
    """Code of a function behind a mark of all of it: what is told of it is cut."""
    text = ast.unparse(node)
    return f"{zlib.crc32(text.encode()):08x}: {text}"


def _defined(node: ast.AST) -> list[str]:
    """Names that a statement of a module gives something."""
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return [str(getattr(node, "name", ""))]


def _is_fixture(node: ast.AST) -> bool:
    """Whether a function is a fixture that every test gets, or stands in for truestep's own."""
    marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
    if not _is_function(node) or not any("fixture" in mark for mark in marks):
        return False
    automatic = any("autouse" in mark for mark in marks)
    return automatic or str(getattr(node, "name", "")).startswith("truestep")


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
    tree = ast.parse(text)
    for fixture in filter(_is_fixture, tree.body):
        found[f"{_OF_ALL}{getattr(fixture, 'name', '')}"] = _marked(fixture)
    for name, node in _named(tree):
        marks = [ast.unparse(mark) for mark in _marks(node)]
        limits = [*_limits(node)] if _is_function(node) else []
        found[name] = "there"
        if marks or limits:
            found[f"{name}{_OF}judged by"] = "; ".join([*marks, *limits])
        if _is_function(node) and (checks := _checks(node)):
            found[f"{name}{_OF}checks"] = str(checks)
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


def _checks(node: ast.AST) -> int:
    """How often a test asks for a check."""
    calls = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return sum(isinstance(f, ast.Attribute) and ast.unparse(f.value) == "truestep" for f in calls)


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


def _reader(kind: RuleKind, path: Path) -> Callable[[bytes], dict[str, str]]:
    if kind == "test" and path.suffix != ".py":
        return _settings
    return _hooks if path.name == "conftest.py" else _READERS[kind]


_READERS: dict[RuleKind, Callable[[bytes], dict[str, str]]] = {
    "known failure": _entries,
    "threshold": _thresholds,
    "reference": _references,
    "case": _cases,
    "test": _tests,
}


def went(state: Promoted, folder: Path) -> list[Path]:
    """Python files under a folder that the promoted state has and that are not there now."""
    words = ("diff", "--name-only", "--no-renames", "--diff-filter=D", "--relative", "-z")
    listed = _git(folder, *words, state.commit, "--", "*.py")
    names = (listed or b"").decode("utf-8", "surrogateescape").split("\0")
    return [folder / name for name in names if name]


def text_then(state: Promoted, path: Path) -> bytes | None:
    """What a file held in the promoted state; None where it was not there."""
    top = next(place for place in path.parents if place.is_dir())
    name = path.relative_to(top).as_posix()
    return _git(top, "cat-file", "blob", f"{state.commit}:./{name}")


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

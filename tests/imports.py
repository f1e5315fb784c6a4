"""Who imports whom in the package: at the top of a module, inside functions, and for types alone.

python -m tests.imports     counts circles and imports against the order of the rooms
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).parent.parent / "src" / "truestep"

VOCABULARY = frozenset(
    {
        "call_case",
        "case",
        "content",
        "controls",
        "environment",
        "errors",
        "files",
        "floors",
        "functions",
        "guard",
        "joint",
        "keys",
        "magic",
        "many",
        "explanations",
        "nests",
        "progress",
        "randomness",
        "reading",
        "records",
        "screen",
        "text",
        "turns",
        "verdict",
    }
)
"""Modules of the package's own folder that every room may use."""

PLUGIN = frozenset(
    {
        "pytest_failures",
        "pytest_fixture",
        "pytest_marked",
        "pytest_plugin",
        "pytest_references",
        "pytest_rules",
        "pytest_updates",
    }
)

ROOMS = (
    "vocabulary",
    "standalone",
    "models",
    "measure",
    "recording",
    "pairing",
    "judge",
    "runtime",
    "calls",
    "replay",
    "training",
    "engines",
    "gates",
    "dropin",
    "serving",
    "experiment",
    "parity",
    "report",
    "demo",
    "testing",
    "cli",
    "pytest_plugin",
)
"""The house, first to last: a room imports itself and rooms before it, lazy imports included."""

Kind = Literal["top", "lazy", "typing"]
KINDS: tuple[Kind, ...] = ("top", "lazy", "typing")


def modules() -> dict[str, Path]:
    """Modules of the package without its name in front; the package's own is `__init__`."""
    named = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        named[name.removesuffix(".__init__")] = path
    return named


def room(module: str) -> str:
    """The room of a module; empty for the package's own two files, which hold no code."""
    first = module.partition(".")[0]
    if first in VOCABULARY and first == module:
        return "vocabulary"
    if first in PLUGIN:
        return "pytest_plugin"
    return "" if first in {"__init__", "__main__"} else first


def imported(path: Path, *kinds: Kind) -> set[str]:
    """Every name that a file imports, dotted: modules, and what is taken out of them."""
    return {name for kind, name in _of_text(path.read_text("utf-8")) if kind in kinds}


@cache
def _of_text(text: str) -> tuple[tuple[Kind, str], ...]:
    return tuple(_imports(ast.parse(text)))


def _imports(node: ast.AST, kind: Kind = "top") -> Iterator[tuple[Kind, str]]:
    for child in ast.iter_child_nodes(node):
        inner = kind
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "lazy" if kind == "top" else kind
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            inner = "typing"
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield kind, alias.name
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield kind, child.module
            for alias in child.names:
                yield kind, f"{child.module}.{alias.name}"
        yield from _imports(child, inner)


def graph(*kinds: Kind) -> dict[str, set[str]]:
    """Modules of the package to the modules of it that they import."""
    named = modules()
    edges = {}
    for module, path in named.items():
        names = {
            name.removeprefix("truestep.")
            for name in imported(path, *kinds)
            if name.startswith("truestep.")
        }
        edges[module] = {name for name in names & named.keys() if not _package_of(name, names)}
        if any(name.partition(".")[0] not in named for name in names):
            edges[module].add("__init__")  # a public name, by way of the package itself
        edges[module].discard(module)
    return edges


def _package_of(name: str, names: set[str]) -> bool:
    """Whether a name is but the package that another imported module is in."""
    package = (SOURCE / name.replace(".", "/")).is_dir()
    return package and any(other.startswith(f"{name}.") for other in names)


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules of which each can be reached from each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges.get(module, ())):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return groups


def against_the_order(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports of a room that comes later, as `judge.rows imports replay.stages`."""
    wrong = []
    for module, others in edges.items():
        for other in sorted(others):
            if room(module) and _place(other) > _place(module):
                wrong.append(f"{module} imports {other}")
    return wrong


def _place(module: str) -> int:
    """Where a module's room stands; what has none, the package itself among it, stands last."""
    return ROOMS.index(room(module)) if room(module) in ROOMS else len(ROOMS)


def main() -> None:
    for kinds in (("top",), ("top", "lazy"), KINDS):
        edges = graph(*kinds)
        count = sum(map(len, edges.values()))
        wrong = against_the_order(edges)
        between = {
            (room(module), room(other))
            for module, others in edges.items()
            for other in others
            if room(module) and room(module) != room(other)
        }
        print(
            f"{' + '.join(kinds)}: {len(edges)} modules, {count} imports, "
            f"{len(between)} pairs of rooms, {len(circles(edges))} circles, "
            f"{len(wrong)} against the order"
        )
        for line in wrong:
            print(f"  {line}")


if __name__ == "__main__":
    main()

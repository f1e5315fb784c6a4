"""How large the package's modules and functions may be, and what may be larger, with its reason.

python -m tests.limits     lists what is over a limit without a reason beside it

A reason is a comment: `# long: why` on a line of its own above a module's imports, `# long: why`,
`# 9 parameters: why` or `# 9 parameters, long: why` beside the head of a function.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize

from tests.imports import modules

LINES = 500
"""Of a module, blank ones and docstrings among them."""

CODE = 60
"""Lines of a function, its head among them and its docstring not."""

PARAMETERS = 8
"""Of a function; `self` and `cls` do not count, `*args` and `**options` do."""

REASON = re.compile(r"#\s*(?:(\d+) parameters)?(?:, )?(long)?: \w+.*\w")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def over(text: str) -> list[str]:
    """What of a module is over a limit without a reason beside it, and what is to be done."""
    tree, comments = ast.parse(text), _comments(text)
    count = len(text.splitlines())
    found = []
    imports = [n.lineno for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    above = range(1, min(imports, default=count + 1))
    if count > LINES and not _reasons(comments, above)[1]:
        found.append(
            f"the module has {count} lines, {LINES} are allowed: "
            "split it in two that each have one job and a name that says it"
        )
    for name, node in _functions(tree):
        end = node.body[0].lineno - (ast.get_docstring(node) is None)
        parameters, long = _reasons(comments, range(node.lineno, end + 1))
        code, given = _code(node), _parameters(node)
        if code > CODE and not long:
            found.append(
                f"{name} has {code} lines of code, {CODE} are allowed: "
                "take out a step that has a name"
            )
        if given > PARAMETERS and parameters != given:
            said = f", and its reason is for {parameters}" if parameters else ""
            found.append(
                f"{name} has {given} parameters, {PARAMETERS} are allowed{said}: "
                "make one object of those that go together"
            )
        if (long or parameters) and code <= CODE and given <= PARAMETERS:
            found.append(f"{name} gives a reason to be over a limit, and is over none: delete it")
    return found


def _comments(text: str) -> dict[int, str]:
    """Comments by line; a `#` in a string is none."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}


def _reasons(comments: dict[int, str], lines: range) -> tuple[int | None, bool]:
    """For how many parameters these lines give a reason, and whether for length."""
    found = [match for at in lines if (match := REASON.match(comments.get(at, "")))]
    numbers = [int(match[1]) for match in found if match[1]]
    return (numbers[0] if numbers else None), any(match[2] for match in found)


def _functions(node: ast.AST, prefix: str = "") -> list[tuple[str, Function]]:
    """Functions and methods by dotted name, those inside others too."""
    found: list[tuple[str, Function]] = []
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, Function | ast.ClassDef):
            inner = f"{prefix}{child.name}."
            found += [(inner[:-1], child)] if isinstance(child, Function) else []
        found += _functions(child, inner)
    return found


def _code(node: Function) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    return lines - ((node.body[0].end_lineno or 0) - node.body[0].lineno + 1)


def _parameters(node: Function) -> int:
    given = node.args
    named = [*given.posonlyargs, *given.args]
    own = bool(named) and named[0].arg in ("self", "cls")
    stars = (given.vararg is not None) + (given.kwarg is not None)
    return len(named) - own + len(given.kwonlyargs) + stars


def main() -> None:
    for name, path in modules().items():
        for line in over(path.read_text("utf-8")):
            print(f"{name}: {line}")


if __name__ == "__main__":
    main()

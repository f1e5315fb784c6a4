"""The source files that each side is made of, and what both sides have in common.

A pass whose two sides run the same code proves nothing about that code. Files are found from what
the loaders return (classes of all submodules, functions and what they close over) and from what
those files and the loaders import.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

FOUNDATIONS = frozenset(
    {
        "einops",
        "h5py",
        "ml_dtypes",
        "numpy",
        "onnx",
        "onnxruntime",
        "pytest",
        "_pytest",
        "safetensors",
        "scipy",
        "tokenizers",
        "torch",
        "truestep",
    }
)
"""Packages that both sides may stand on: their versions are part of the environment."""

_LIBRARY_ROOTS = tuple(
    {Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "platstdlib")}
)
_SITE_ROOTS = tuple({Path(sysconfig.get_paths()[key]).resolve() for key in ("purelib", "platlib")})


def source_files(
    loader: Any, loaded: Any, *, roots: Iterable[Path], declared: Iterable[Path] = ()
) -> frozenset[Path]:
    """Source files of one side, resolved.

    Args:
        loader: The function that loads it.
        loaded: What it returned: functions, modules, arrays.
        roots: Folders whose files' imports are followed (the project, the official repository);
            imports of files elsewhere are taken, not followed.
        declared: Files to take besides.
    """
    search = _Search(tuple(root.resolve() for root in roots), home=_file_of(loader))
    search.function(loader, follow_home=True)
    search.thing(loaded)
    for path in declared:
        search.file(Path(path).resolve())
    return frozenset(search.found - {search.home} if search.home else search.found)


def shared_modules(actual: Any, reference: Any) -> tuple[str, ...]:
    """Addresses at which both sides hold the same module object, or the same function."""
    ours, theirs = _module_of(actual), _module_of(reference)
    if ours is not None and theirs is not None:
        known = {id(module) for module in theirs.modules()}
        return tuple(
            f"module object {name or '(root)'}"
            for name, module in ours.named_modules()
            if id(module) in known
        )
    if callable(actual) and actual is reference:
        return ("the same function",)
    return ()


def shared_files(
    actual: Iterable[Path], reference: Iterable[Path], *, allowed: Mapping[str, str]
) -> tuple[Path, ...]:
    """Files of both sides that no `allow_shared` entry explains, sorted."""
    common = sorted(set(actual) & set(reference))
    return tuple(
        path for path in common if not any(path.as_posix().endswith(end) for end in allowed)
    )


def is_library(path: Path) -> bool:
    """Whether a file belongs to Python, torch or another foundation of both sides."""
    resolved = path.resolve()
    for site in _SITE_ROOTS:
        if site in resolved.parents:
            return resolved.relative_to(site).parts[0].removesuffix(".py") in FOUNDATIONS
    here = Path(__file__).resolve().parents[1]
    return here in resolved.parents or any(root in resolved.parents for root in _LIBRARY_ROOTS)


def _module_of(value: Any) -> Any:
    import torch

    return value if isinstance(value, torch.nn.Module) else getattr(value, "module", None)


def _file_of(value: Any) -> Path | None:
    name = getattr(value, "__file__", None)
    if name is None:
        try:
            name = inspect.getsourcefile(inspect.unwrap(value))
        except (TypeError, OSError):
            return None
    if name is None or not str(name).endswith(".py"):
        return None
    path = Path(name)
    return path.resolve() if path.is_file() else None


class _Search:
    """Collects files from objects and from imports."""

    def __init__(self, roots: tuple[Path, ...], home: Path | None) -> None:
        self.roots, self.home = roots, home
        self.found: set[Path] = set()
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # an id means something only while its object lives

    def file(self, path: Path | None) -> None:
        """Take a file, and follow its imports if it is below one of the roots."""
        if path is None or path in self.found or path == self.home or is_library(path):
            return
        self.found.add(path)
        in_site = any(site in path.parents for site in _SITE_ROOTS)
        if any(root in path.parents for root in self.roots) and not in_site:
            for imported in _imports_of_file(path):
                self.file(imported)

    def thing(self, value: Any, depth: int = 0) -> None:
        """Take the files that a value's code is in."""
        import torch

        if id(value) in self._seen or depth > 6:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                self.file(_file_of(type(module)))
        elif isinstance(value, ModuleType):
            self.file(_file_of(value))
        elif isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                self.thing(item, depth + 1)
        elif isinstance(value, MethodType):
            self.thing(value.__self__, depth + 1)
            self.function(value.__func__)
        elif isinstance(value, FunctionType):
            self.function(value, follow_home=_file_of(value) == self.home, depth=depth)
        elif isinstance(value, type):
            self.file(_file_of(value))
        elif isinstance(value, (list, tuple, dict)):
            for item in list(value.values() if isinstance(value, dict) else value)[:50]:
                self.thing(item, depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
            self.file(_file_of(type(value)))
            for item in vars(value).values():
                self.thing(item, depth + 1)

    def function(self, value: Any, *, follow_home: bool = False, depth: int = 0) -> None:
        """Take a function's file; of the test's own file, only what the function itself uses."""
        value = inspect.unwrap(value) if callable(value) else value
        self._seen.add(id(value))
        self._kept.append(value)
        if not isinstance(value, FunctionType):
            self.thing(value, depth + 1)
            return
        home = _file_of(value)
        if home != self.home:
            self.file(home)
        for cell in value.__closure__ or ():
            try:
                self.thing(cell.cell_contents, depth + 1)
            except ValueError:  # a cell that is not filled
                continue
        if home == self.home and (follow_home or home is not None):
            for name in _names(value.__code__):
                if name in value.__globals__:
                    self.thing(value.__globals__[name], depth + 1)
            for imported in _imports_of_function(value):
                self.file(imported)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _imports_of_function(value: FunctionType) -> list[Path]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, SyntaxError):
        return []
    return _resolve(tree, package=str(value.__globals__.get("__package__") or ""))


def _imports_of_file(path: Path) -> list[Path]:
    name = next(
        (n for n, m in list(sys.modules.items()) if getattr(m, "__file__", None) == str(path)), ""
    )
    module = sys.modules.get(name)
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    return _resolve(tree, package=str(getattr(module, "__package__", "") or ""))


def _resolve(tree: ast.AST, *, package: str) -> list[Path]:
    """Files that the imports in a tree lead to, as far as they are loaded."""
    found: list[Path | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [_file_of(sys.modules.get(alias.name)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1])
                name = f"{base}.{name}".strip(".") if name else base
            found += [_origin(name, alias.name) for alias in node.names]
    return [path for path in found if path is not None]


def _origin(module: str, name: str) -> Path | None:
    """The file that defines a name imported from a module."""
    home = sys.modules.get(module)
    value = sys.modules.get(f"{module}.{name}") or getattr(home, name, None)
    if isinstance(value, ModuleType):
        return _file_of(value)
    own = getattr(value, "__module__", None)
    if isinstance(own, str) and own in sys.modules and isinstance(value, (type, FunctionType)):
        return _file_of(sys.modules[own])
    return _file_of(home)

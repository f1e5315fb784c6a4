"""The user's own functions, named as FILE.py:FUNCTION."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from truestep.errors import ProcessEndedError, UsageError, last_frame
from truestep.text import listed, nearest


def parts_of(spec: str, option: str) -> tuple[str, str]:
    """File and function of a FILE.py:FUNCTION.

    Raises:
        UsageError: It is none.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not name or not file:
        raise UsageError(
            f"{option} needs FILE.py:FUNCTION, got {spec!r}", measured=_held(Path(file or spec))
        )
    return file, name


def _held(path: Path) -> str:
    """The functions and classes of a Python file, which is not run; empty where it has none."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, ValueError, SyntaxError):  # what is wrong with it is told where it is run
        return ""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [each.name for each in body if isinstance(each, kinds)]
    return f"{path} has {listed(names)}" if names else ""


def function_of(path: Path, name: str, option: str) -> Callable[[Any], Any]:
    """A function of a Python file, which is run for it.

    Args:
        path: The file; what is beside it can be imported by it.
        name: The function.
        option: What named it, for errors.

    Raises:
        UsageError: The file cannot be imported or has no such function.
        ProcessEndedError: It called sys.exit.
    """
    module = _module(path, option)
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    public = [key for key, value in vars(module).items() if callable(value)]
    raise UsageError(
        f"no function {name!r}",
        where=str(path),
        measured=_held(path),
        likely=nearest(name, public),
    )


def _module(path: Path, option: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"truestep_apply_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"the file of {option} cannot be read", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise ProcessEndedError(
            f"the file of {option} ended the process (SystemExit: {error.code})",
            where=last_frame(error),
            likely="what a script does when it is run belongs under if __name__ == '__main__'",
        ) from error
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"the file of {option} raised {type(error).__name__}: {error}", where=str(path)
        ) from error
    finally:
        sys.path.pop(0)
    return module

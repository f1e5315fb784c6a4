"""What a shell completes: names of cases, and keys of `--set`. Neither torch nor diffusers is
imported: names of arguments are read in the source of a pipeline."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

_UNSAID = ("self", "generator", "return_dict", "callback_on_step_end", "output_type")
"""Arguments of a call that no case says."""


def cases(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names in the case file, ids of stored references, and folders of models."""
    names = [*_in_file(context), *_recorded(context), *_models(incomplete)]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def settings(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """`KEY=` of a case's values, its settings, and the arguments of the pipeline's call; after
    `compile=` its modes."""
    from truestep.call_case import COMPILE_MODES

    if incomplete.startswith("compile="):
        found = [f"compile={mode}" for mode in COMPILE_MODES]
    else:
        found = [f"{key}=" for key in _keys(_chosen(context))]
    return [text for text in found if text.startswith(incomplete)]


def _chosen(context: click.Context) -> Sequence[str]:
    """What is typed before the option: click leaves it in `args` where the option has no value."""
    given = context.params.get("names") or ()
    return [*given, *context.args]


def _keys(names: Sequence[str]) -> list[str]:
    from truestep.call_case import CallCase
    from truestep.case import setting_names

    model = next((Path(name) for name in names if Path(name).is_dir()), None)
    if model is None:
        return setting_names()
    own = [key for key in CallCase.model_fields if key not in ("call", "input", "sha256")]
    return sorted({*own, *_arguments(_class_of(model))})


def _in_file(context: click.Context) -> Iterator[str]:
    """Names in the case file; none where it cannot be read."""
    from truestep.errors import TruestepError
    from truestep.reading import parse_toml, read

    path = Path(context.params.get("case_file") or "truestep.toml")
    try:
        content = read(path, "the case file is damaged", parse_toml)
    except TruestepError:
        return
    tables: Any = content.get("case", {})
    yield from tables if isinstance(tables, dict) else ()


def _recorded(context: click.Context) -> Iterator[str]:
    """Ids of references, by the names of their files."""
    root = Path(context.params.get("references") or "truestep-references")
    yield from (path.stem for path in sorted(root.glob("*/*/*/*.safetensors")))


def _models(incomplete: str) -> Iterator[str]:
    """Folders that diffusers wrote, below what is typed."""
    folder = incomplete.rpartition("/")[0]
    for path in sorted(Path(folder or ".").glob("*/model_index.json")):
        yield f"{folder}/{path.parent.name}" if folder else path.parent.name


def _class_of(model: Path) -> str:
    try:
        index = json.loads((model / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return str(index.get("_class_name", "")) if isinstance(index, dict) else ""


def _arguments(name: str) -> list[str]:
    """Arguments of the call of a pipeline of diffusers, read in its source."""
    spec = importlib.util.find_spec("diffusers") if name.isidentifier() else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder, "pipelines").rglob("pipeline_*.py"):
            text = path.read_text("utf-8")
            if f"class {name}(" in text:
                return [x for x in _of_call(ast.parse(text), name) if x not in _UNSAID]
    return []


def _of_call(tree: ast.Module, name: str) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == "__call__":
                    yield from (arg.arg for arg in (*inner.args.args, *inner.args.kwonlyargs))

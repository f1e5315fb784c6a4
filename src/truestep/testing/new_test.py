"""Write the first test of a pipeline's folder, or of a module that a function loads."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.errors import FOREIGN, UsageError, one_line, surviving
from truestep.text import quoted, slug, visible

_PIPELINE = '''\
"""Is it still the same model? {what} of {subject}.

    pytest {file} --truestep-update    makes the reference, of a model that you trust
    pytest {file}                      says whether it is still that model, and where it is not
"""

from pathlib import Path

import pytest
from diffusers import {cls}

from truestep.runtime.loading import quiet
{imported}
MODEL = {model}  # edit: the folder, or a hub id

CALL = {{  # edit: what it is called with; few steps of something small are enough
{call}
}}


@pytest.fixture(scope="module")
def pipe():
    with quiet():  # no loading bars
        pipe = {cls}.from_pretrained(MODEL)  # edit: torch_dtype=torch.bfloat16, .to("cuda"), ...
    pipe.set_progress_bar_config(disable=True)
    # edit: here goes what is under test, such as pipe.transformer.fuse_qkv_projections()
    return pipe


def test_{name}(truestep, pipe):
    truestep.check_pipeline(pipe, CALL)  # each call of it, and the code between, on its own
'''

_MODULE = '''\
"""Is it still the same model? {what} of {subject}.

    pytest {file} --truestep-update    makes the reference, of a module that you trust
    pytest {file}                      says whether it is still the same
"""

{head}

def inputs():
    generator = torch.Generator("cpu").manual_seed(0)
    return {inputs}  # edit


@torch.no_grad()
def test_{name}(truestep):
    torch.manual_seed(0)  # weights that the function draws itself
    {load}
    # edit: here goes what is under test, such as module = torch.compile(module)
    output = module.eval()(**given)
    truestep.check({output})
'''

_BESIDE = """\
import torch

from {source} import {function}
"""

_ELSEWHERE = """\
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "{folder}"))

from {source} import {function}  # noqa: E402
"""


@dataclass(frozen=True)
class NewTest:
    """A test file before it is written."""

    path: Path
    what: str
    text: str


def new_test(subject: str, output: Path | None = None) -> NewTest:
    """The first test of a pipeline or a module.

    Args:
        subject: A folder of a diffusers pipeline; or FILE.py:FUNCTION or package.module:FUNCTION,
            a function that returns a module, or a module and a dict of its inputs.
        output: Where it goes; default `test_NAME.py` here.

    Raises:
        UsageError: The file exists, or the subject is neither, or cannot be called by itself.
        ModelLoadError: The folder is none of a pipeline.
    """
    folder = Path(subject)
    _, colon, function = subject.rpartition(":")
    is_folder = folder.is_dir() or not colon
    name = slug(folder.resolve().name if is_folder else function, 40).replace("-", "_") or "model"
    path = output if output is not None else Path(f"test_{name}.py")
    if path.exists():
        other = quoted(str(path.with_name(f"{path.stem}_2.py")))
        raise UsageError(
            "the test exists, and is not replaced",
            where=str(path),
            hint=f"truestep new test {quoted(subject)} --output {other}",
        )
    made = _of_pipeline(folder, name, path) if is_folder else _of_module(subject, name, path)
    compile(made.text, str(path), "exec")
    return made


def _of_pipeline(folder: Path, name: str, path: Path) -> NewTest:
    """A test of every call of a pipeline."""
    from truestep.runtime.loading import model_index
    from truestep.testing.tiny import example_call

    if not folder.is_dir():
        raise UsageError(
            "this is no folder of a pipeline",
            where=str(folder),
            hint="give a folder, or a function that loads a module: port.py:load",
        )
    if (folder / "modular_model_index.json").exists():
        raise UsageError(
            "a modular pipeline has no call of its own to begin with",
            where=str(folder),
            hint="give the folder of a plain pipeline",
        )
    cls = str(model_index(folder).get("_class_name"))
    call = {k: v for k, v in example_call(cls).items() if k != "generator"}
    drawn = [key for key, value in call.items() if not _plain(value)]
    lines = [
        f'    "{key}": EXAMPLE["{key}"],  # edit: your own, as PIL.Image.open("cat.png")'
        if key in drawn
        else f'    "{key}": {_literal(value)},'
        for key, value in call.items()
    ]
    example = f'\nEXAMPLE = example_call("{cls}")  # pictures and tensors drawn from a seed\n'
    text = _PIPELINE.format(
        what=cls,
        subject=_in_docstring(folder.name),
        file=path.name,
        cls=cls,
        imported=f"from truestep.testing.tiny import example_call\n{example}" if drawn else "",
        model=_relative(folder, path),
        call="\n".join(lines),
        name=name,
    )
    return NewTest(path, cls, text)


def _relative(folder: Path, path: Path) -> str:
    """An expression for a folder, counted from the test that reads it."""
    relative = os.path.relpath(folder.resolve(), path.resolve().parent)
    return f"Path(__file__).parent / {_literal(Path(relative).as_posix())}"


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _in_docstring(text: str) -> str:
    return visible(text).replace("\\", "/").replace('"', "'")


def _plain(value: Any) -> bool:
    """Whether a value stands for itself in a file of Python."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(_plain(part) for pair in value.items() for part in pair)
    return value is None or isinstance(value, str | bool | int | float)


def _of_module(subject: str, name: str, path: Path) -> NewTest:
    """A test of what a module gives."""
    import torch

    from truestep.randomness import own_randomness

    file, _, function = subject.rpartition(":")
    with own_randomness(), surviving("the function that loads the module"), torch.no_grad():
        loaded = _called(_function(file, function), subject)
        module, given = loaded if isinstance(loaded, tuple) and len(loaded) == 2 else (loaded, None)
        if not isinstance(module, torch.nn.Module):
            raise UsageError(
                f"{visible(subject)} returns no module",
                measured=f"it returned a {type(loaded).__name__}",
                hint="return a torch.nn.Module, or a module and a dict of its inputs",
            )
        if given is None:
            inputs, output = _guessed(module.eval(), subject)
        else:
            inputs, output = "", module.eval()(**given)
    there = Path(file) if file.endswith(".py") else None
    beside = there is None or there.resolve().parent == path.resolve().parent
    folder = os.path.relpath(there.resolve().parent, path.resolve().parent) if there else ""
    text = _MODULE.format(
        what=type(module).__name__,
        subject=_in_docstring(subject),
        file=path.name,
        head=(_BESIDE if beside else _ELSEWHERE).format(
            source=there.stem if there else file,
            function=function,
            folder=Path(folder).as_posix(),
        ),
        inputs=inputs,
        name=name,
        load=f"module, given = {function}()"
        if given is not None
        else f"module, given = {function}(), inputs()",
        output=_compared(output),
    )
    if given is not None:
        text = _without_inputs(text)
    return NewTest(path, type(module).__name__, text)


def _without_inputs(text: str) -> str:
    """A test whose function gives the inputs itself."""
    head, _, rest = text.partition("def inputs():")
    return head + "@torch.no_grad()" + rest.partition("@torch.no_grad()")[2]


def _function(file: str, name: str) -> Callable[[], Any]:
    from truestep.functions import function_of

    if file.endswith(".py"):
        loads: Callable[..., Any] = function_of(Path(file), name, "new test")
        return loads
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(file), name, None)
    except FOREIGN as error:  # whatever importing it raises
        raise UsageError(f"{visible(file)} cannot be imported: {one_line(error)}") from error
    if not callable(found):
        raise UsageError(f"no function {name!r}", where=file)
    return found


def _called(function: Callable[[], Any], subject: str) -> Any:
    try:
        return function()
    except FOREIGN as error:  # the user's own code
        raise UsageError(
            f"{visible(subject)} raised {one_line(error)}",
            hint="give a function that takes no arguments",
        ) from error


def _guessed(module: Any, subject: str) -> tuple[str, Any]:
    """Inputs that a module takes, as an expression, and what it gives for them.

    Raises:
        UsageError: None of those that its first layer suggests is taken.
    """
    import inspect

    required = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    raised = "it takes several" if len(required) > 1 else ""
    for expression, value in _first_inputs(module) if len(required) == 1 else ():
        try:
            output = module(**{required[0]: value})
        except FOREIGN as error:  # the module does not take it
            raised = one_line(error)
            continue
        return f'{{"{required[0]}": {expression}}}', output
    raise UsageError(
        "which inputs the module takes cannot be told from it",
        where=f"{subject}: {', '.join(required) or 'no inputs'}",
        measured=raised,
        hint="return them beside the module: return module, {'x': torch.randn(2, 8)}",
    )


def _first_inputs(module: Any) -> Iterator[tuple[str, Any]]:
    """Inputs that the first layers of a module would take, as expressions and as they are."""
    import torch

    for layer in module.modules():
        if isinstance(layer, torch.nn.Embedding):
            count = layer.num_embeddings
            ids = torch.randint(0, count, (1, 8))
            yield f"torch.randint(0, {count}, (1, 8), generator=generator)", ids
        for shape in _shapes(layer):
            sizes = ", ".join(map(str, shape))
            yield f"torch.randn({sizes}, generator=generator)", torch.randn(shape)


def _shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    import torch

    if isinstance(layer, torch.nn.Linear):
        yield (2, 8, layer.in_features)
        yield (2, layer.in_features)
    elif isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        yield (1, layer.in_channels, *[16] * len(layer.kernel_size))
    elif isinstance(layer, torch.nn.LayerNorm):
        yield (2, *layer.normalized_shape)


def _compared(output: Any) -> str:
    """An expression that makes tensors by name of what a module gives."""
    if isinstance(output, Mapping):
        return "dict(output)"
    if isinstance(output, list | tuple):
        return "{str(at): part for at, part in enumerate(output)}"
    return "output"


def commands(test: NewTest) -> tuple[str, str]:
    """What makes the reference, and what checks by it."""
    run = f"pytest {quoted(str(test.path))}"
    return f"{run} --truestep-update", run

"""What runs: components that can be watched, and one callable that uses them."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.calls.blocks import root_of
from truestep.errors import UsageError
from truestep.runtime.pipeline import Code

SEED = 0
"""Of random numbers that nobody gave a generator for."""


@dataclass(frozen=True)
class Subject:
    """Anything that runs, and where it can be cut.

    Attributes:
        run: Runs it once, from the same inputs and random numbers each time; returns its outputs.
        components: Name to module, scheduler, guider or any callable object.
        functions: Name to (owner, attribute) of further functions, as an engine has them: `step`,
            `schedule` and `guidance` are taken as what they say.
        label: What it is called in results.
        blocks: The blocks that its code is made of, if it is; see `truestep.calls.blocks`.
        code: Entered while it runs, where a change replaced code that the process shares; see
            `truestep.replay.shared_code`.
    """

    run: Callable[[], Any]
    components: Mapping[str, Any] = field(default_factory=dict)
    functions: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    label: str = "candidate"
    blocks: Any = None
    code: Code = nullcontext


def subject_of(
    thing: Any,
    /,
    *args: Any,
    components: Mapping[str, Any] | None = None,
    functions: Mapping[str, tuple[Any, str]] | None = None,
    seed: int = SEED,
    **inputs: Any,
) -> Subject:
    """A subject of a pipeline, a module or a function, called with inputs.

    Args:
        thing: A pipeline (an object with `components`), a module, or a function that uses
            `components`.
        args, inputs: What it is called with. They are copied for every run; a generator among
            them starts every run where it was made to start.
        components: What is watched; of a pipeline, beside its own.
        functions: Further boundaries; see `Subject`.
        seed: Of a pipeline's generator, where none is given, and of torch's, Python's and numpy's
            own at the start of every run.

    Raises:
        UsageError: The thing cannot be called.
    """
    if isinstance(thing, Subject):
        return thing
    if not callable(thing):
        raise UsageError(
            f"{type(thing).__name__} cannot be run",
            measured="needed: a pipeline, a module or a function",
        )
    named = dict(components or {})
    held = components_of(thing)
    if held is not None:
        named = {**{str(k): v for k, v in held.items() if watchable(v)}, **named}
        if "generator" not in inputs and _takes(thing, "generator"):
            inputs["generator"] = torch.Generator("cpu").manual_seed(seed)
    elif isinstance(thing, torch.nn.Module):
        named = {"module": thing, **named}
    elif not named and not functions:
        thing = Called(thing)
        named = {"function": thing}

    def run() -> Any:
        seed_all(seed)
        fresh_args, fresh_inputs = fresh((args, inputs))
        with torch.no_grad():
            return thing(*fresh_args, **fresh_inputs)

    label = type(thing).__name__
    return Subject(run, named, dict(functions or {}), label=label, blocks=root_of(thing))


def components_of(thing: Any) -> Mapping[str, Any] | None:
    """The components of a pipeline; None of what has none.

    Raises:
        UsageError: Its class does not know one that was given to it.
    """
    try:
        held = getattr(thing, "components", None)
    except ValueError as error:  # as diffusers does where one is registered under another name
        raise UsageError(
            f"the components of {type(thing).__name__} cannot be told",
            measured=str(error).rstrip().splitlines()[-1][:200],
            likely="one was registered that its class does not have",
            hint="set it as an attribute of the pipeline",
        ) from None
    return held if isinstance(held, Mapping) else None


class Called:
    """A function as a component: calls of it can be watched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.__wrapped__(*args, **kwargs)


def watchable(value: Any) -> bool:
    """Whether a component may have boundaries: an object with code, no setting."""
    plain = (str, bytes, int, float, bool, list, tuple, dict, set, type(None), torch.Tensor)
    return not isinstance(value, plain) and not inspect.isclass(value)


def seed_all(seed: int) -> None:
    """Set the state of every random number generator of the process that is in use."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def fresh(inputs: Any) -> Any:
    """A copy of inputs, with generators at their start and everything with code as it is."""
    memo: dict[int, Any] = {}
    for part in _parts(inputs, 0):
        if isinstance(part, torch.Generator):
            again = torch.Generator(part.device)
            memo[id(part)] = again.manual_seed(part.initial_seed())
        elif isinstance(part, torch.nn.Module) or callable(part):
            memo[id(part)] = part
        elif isinstance(part, torch.Tensor):
            memo[id(part)] = part.detach().clone().requires_grad_(part.requires_grad)
    return copy.deepcopy(inputs, memo)


def _parts(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth > 8:
        return
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _parts(part, depth + 1)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _parts(part, depth + 1)


def _takes(pipeline: Any, name: str) -> bool:
    """Whether a pipeline's call has an input: by its signature, or by what its blocks say."""
    blocks = getattr(pipeline, "blocks", None)
    if blocks is not None:
        return name in (getattr(blocks, "input_names", None) or ())
    try:
        return name in inspect.signature(pipeline.__call__).parameters
    except (TypeError, ValueError):
        return False

"""What a pipeline's call takes: names, defaults, what it needs; and what a case may say of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from truestep.call_case import CallCase
from truestep.errors import CaseError
from truestep.text import nearest

_NO_ARGUMENTS = ("self", "generator")


@dataclass(frozen=True)
class Signature:
    """What can be given to a call.

    Attributes:
        where: Whose it is, for errors: `FluxPipeline.__call__`.
        names: Of its arguments, in order.
        defaults: Of those that have one.
        needed: Names without which it cannot run.
        free: Whether it takes others, too.
        always: Arguments that are always given, unless a case says another value.
    """

    where: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    needed: tuple[str, ...]
    free: bool = False
    always: Mapping[str, Any] = field(default_factory=dict)


def signature_of(pipeline: type) -> Signature:
    """The arguments of a pipeline class, by its `__call__`."""
    parameters = inspect.signature(pipeline.__call__).parameters
    empty = inspect.Parameter.empty
    names = tuple(name for name in parameters if name not in _NO_ARGUMENTS)
    ordinary = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return Signature(
        where=f"{pipeline.__name__}.__call__",
        names=names,
        defaults={n: parameters[n].default for n in names if parameters[n].default is not empty},
        needed=tuple(
            name
            for name in names
            if parameters[name].kind is ordinary and parameters[name].default is empty
        ),
        free=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()),
    )


def signature_of_blocks(blocks: Any, case: CallCase) -> Signature:
    """The arguments of blocks of a modular pipeline, by what they say of themselves.

    What they give is asked for by name, all of it: else a call returns its whole state. What is
    needed is what the first of them needs that runs with a case's arguments: what later ones need
    an earlier one may give.
    """
    inputs = [each for each in blocks.inputs if each.name and each.name not in _NO_ARGUMENTS]
    given = [output.name for output in blocks.outputs]
    first = blocks.get_execution_blocks(**case.call, **dict.fromkeys(case.input, True)) or blocks
    while getattr(first, "sub_blocks", None):
        first = next(iter(first.sub_blocks.values()))
    output: Any = given[0] if len(given) == 1 else given
    return Signature(
        where=f"{type(blocks).__name__}.input_names",
        names=(*(each.name for each in inputs), "output"),
        defaults={**{each.name: each.default for each in inputs}, "output": output},
        needed=tuple(each.name for each in first.inputs if each.name and each.required),
        always={"output": output},
    )


def refuse_arguments(signature: Signature, case: CallCase) -> None:
    """Refuse arguments that the call has not, and a call without what it needs.

    Raises:
        CaseError: There is one.
    """
    given = [*case.call, *case.input]
    if "generator" in given:
        raise CaseError(
            "a generator is made from the case's seed",
            where=signature.where,
            hint="leave generator out of the case",
        )
    for name in given:
        if name not in signature.names and not signature.free:
            raise CaseError(
                f"the call has no argument {name!r}",
                where=signature.where,
                measured=f"it has: {', '.join(signature.names)}",
                likely=nearest(name, [*signature.names, *CallCase.model_fields]),
            )
    for name in signature.needed:
        if name not in given:
            raise _needed(signature, name)


@contextmanager
def named_missing(signature: Signature) -> Iterator[None]:
    """What blocks of a modular pipeline say of an input that is missing, as a case's error."""
    try:
        yield
    except ValueError as error:
        missing = _MISSING.fullmatch(str(error).strip())
        if missing is None:
            raise
        raise _needed(signature, missing[1]) from error


_MISSING = re.compile(r"Required input '(\w+)' is missing")


def _needed(signature: Signature, name: str) -> CaseError:
    return CaseError(
        f"the call needs {name}, which is not given",
        where=signature.where,
        hint=f"give --input {name}=PATH or --set {name}=VALUE, or it in the case",
    )


def said(signature: Signature, call: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call as JSON: what was given, and the pipeline's defaults."""
    values = {**signature.defaults, **call}
    return {k: plain(v) for k, v in values.items() if k not in _NO_ARGUMENTS}


def other_defaults(signature: Signature, recorded: object, call: Mapping[str, Any]) -> list[str]:
    """Defaults that the pipeline had when it was recorded, and has no more."""
    now = said(signature, call)
    before = recorded if isinstance(recorded, dict) else {}
    return [
        f"default of {name}: {now.get(name, '(none)')!r:.60} here, {before[name]!r:.60} recorded"
        for name in sorted(before)
        if name not in call and now.get(name) != before[name]
    ]


def plain(value: Any) -> Any:
    """A value as JSON; of what JSON does not hold, what it is."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    size = getattr(value, "size", None)
    shape = getattr(value, "shape", size if isinstance(size, tuple) else ())
    sizes = "x".join(map(str, shape))
    return f"{type(value).__name__} {sizes}".strip()

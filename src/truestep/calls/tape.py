"""A run as the operators it was made of, so that another process can make it again.

A tape holds every operator that PyTorch's dispatcher ran, with its arguments, and every tensor that
came from outside (weights, inputs). It needs neither the model's code nor its libraries: whatever a
Python function, a pipeline or a TorchScript module did is there, and control flow is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from hashlib import sha256
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

IDLE_S = 60.0
"""A process that plays tapes ends after so long without one."""

MADE = "made"
"""What it answers when it has played one; anything else is why it could not."""


class Operation(NamedTuple):
    """One operator of a tape.

    Attributes:
        name: `namespace::operator.overload`.
        args, kwargs: Encoded; a tensor is `["tensor", NUMBER]`.
        results: Numbers of the tensors that it returned, in order; -1 where it returned none.
        seed: Number of the state that torch's own generator had, where it drew from that.
    """

    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[int]
    seed: int | None = None


class Tape(TorchDispatchMode):
    """Records while it is entered; see the module's text.

    Attributes:
        operations: In order.
        outside: Number to tensor, of what the operations did not make.
        problem: Why the tape cannot be played, if so.
        of_weights: Weights that are made when they are used are made on the tape: it holds what
            they are made from.
    """

    of_weights = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.outside: dict[int, torch.Tensor] = {}
        self.problem = ""
        self._numbers: dict[int, tuple[int, Any]] = {}  # by id; with what tells that it is gone
        self._stored: dict[int, list[int]] = {}  # numbers of `outside` by where their memory is
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiled runs in this mode; to keep dynamo out costs more than most operators."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and keep it; nothing more is kept once the tape cannot be played."""
        kwargs = kwargs or {}
        if self.problem:
            return func(*args, **kwargs)
        if any(isinstance(value, torch.UntypedStorage) for value in args):
            return self._onto_storage(func, args, kwargs)
        name, mutable, draws = _traits(func)
        seed = self._seed(kwargs) if draws else None
        encoded = [self._encoded(value) for value in args]
        named = {key: self._encoded(value) for key, value in kwargs.items()} if kwargs else {}
        if mutable:
            self._keep_before(func, args, kwargs)
        made = func(*args, **kwargs)
        results = [
            self._number(value) if isinstance(value, torch.Tensor) else -1 for value in _flat(made)
        ]
        if mutable or any(number >= 0 for number in results):
            self.operations.append(Operation(name, encoded, named, results, seed))
        return made

    def _onto_storage(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A tensor laid over memory that was copied, as deep copies are, comes from outside."""
        made = func(*args, **kwargs)
        for tensor in _flat(made):
            self._numbers.pop(id(tensor), None)
        return made

    def number(self, tensor: torch.Tensor) -> int | None:
        """Number of a tensor that an operation made; None of any other."""
        found = self._known(tensor)
        return None if found in self.outside else found

    def made_from(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """Numbers of all that operations made from these."""
        numbers = {self._known(tensor) for tensor in tensors}
        found: set[int] = set()
        for _, args, kwargs, results, _ in self.operations:
            mentioned = _mentioned([args, list(kwargs.values())])
            if not numbers.isdisjoint(mentioned) or not found.isdisjoint(mentioned):
                found.update(results)
        return found

    def size(self) -> int:
        """Bytes of what came from outside."""
        return sum(t.numel() * t.itemsize for t in self.outside.values())

    def _known(self, tensor: torch.Tensor) -> int | None:
        number, place = self._numbers.get(id(tensor), _NOBODY)
        return None if place is None or place.expired() else number

    def _give(self, thing: torch.Tensor) -> int:
        """The next number. The tensor is not kept alive; another may later have its place."""
        number, self._count = self._count, self._count + 1
        self._numbers[id(thing)] = number, torch._C._WeakTensorRef(thing)  # type: ignore[attr-defined]
        return number

    def _keep(self, number: int, tensor: torch.Tensor) -> None:
        self.outside[number] = tensor
        self._stored.setdefault(tensor.untyped_storage().data_ptr(), []).append(number)

    def _number(self, tensor: torch.Tensor) -> int:
        found = self._known(tensor)
        if found is not None:
            return found
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            self.problem = self.problem or f"a tensor on {tensor.device.type} ({tensor.layout})"
        return self._give(tensor)

    def _taken(self, tensor: torch.Tensor) -> int:
        before = self._count
        number = self._number(tensor)
        if number >= before:
            self._keep(number, tensor.detach())
        return number

    def _state(self, generator: torch.Generator) -> int:
        state = generator.get_state()
        number = self._give(state)
        self._keep(number, state)
        return number

    def _seed(self, kwargs: Mapping[str, Any]) -> int | None:
        given = isinstance(kwargs.get("generator"), torch.Generator)
        return None if given else self._state(torch.default_generator)

    def _keep_before(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep a copy of what an operation is about to change, as it was when it was taken."""
        for at, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            value = kwargs.get(argument.name, args[at] if at < len(args) else None)
            for tensor in _flat(value) if written else ():
                if isinstance(tensor, torch.Tensor):
                    self._copy_of_storage(tensor)

    def _copy_of_storage(self, tensor: torch.Tensor) -> None:
        same = self._stored.pop(tensor.untyped_storage().data_ptr(), [])
        if len(same) > 1:
            self.problem = self.problem or "tensors that share memory are changed in place"
        for number in same:
            kept = self.outside[number]
            copy = torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype)
            self._keep(number, copy.copy_(kept))

    def _encoded(self, value: Any) -> Any:
        if type(value) in _AS_THEY_ARE:
            return value
        if isinstance(value, torch.Tensor):
            return ["tensor", self._taken(value)]
        if isinstance(value, torch.Generator):
            return ["generator", self._state(value)]
        if isinstance(value, (list, tuple)):
            return ["list", [self._encoded(item) for item in value]]
        for kind in (torch.dtype, torch.device, torch.layout, torch.memory_format):
            if isinstance(value, kind):
                return [kind.__name__, str(value).removeprefix("torch.")]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if isinstance(value, (int, float, str)):
            return value
        self.problem = self.problem or f"an argument of type {type(value).__name__}"
        return None


_NOBODY: tuple[int, Any] = (-1, None)
_AS_THEY_ARE = frozenset({type(None), bool, int, float, str})
"""Types of arguments that are written as they are."""


@cache
def _traits(func: Any) -> tuple[str, bool, bool]:
    """Name of an operator, whether it changes an argument, and whether it draws at random."""
    draws = torch.Tag.nondeterministic_seeded in func.tags
    return func.name(), func._schema.is_mutable, draws


def _flat(made: Any) -> list[Any]:
    if not isinstance(made, (list, tuple)):
        return [made]
    return [item for part in made for item in _flat(part)]


def save(tape: Tape, outputs: Mapping[str, int], path: Path, *, flags: Mapping[str, Any]) -> None:
    """Write a tape for `play`."""
    content = {
        "operations": [list(operation) for operation in tape.operations],
        "outside": _apart(tape.outside),
        "outputs": dict(outputs),
        "flags": dict(flags),
    }
    torch.save(content, path)


def _apart(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Tensors, copied where one memory is seen as several types, which no file holds."""
    types: dict[int, set[torch.dtype]] = {}
    for tensor in tensors.values():
        types.setdefault(tensor.untyped_storage().data_ptr(), set()).add(tensor.dtype)
    return {
        number: tensor.clone() if len(types[tensor.untyped_storage().data_ptr()]) > 1 else tensor
        for number, tensor in tensors.items()
    }


def play(content: Mapping[str, Any], *, parts: int = 1) -> dict[str, torch.Tensor]:
    """Run a tape's operators.

    Args:
        content: What `save` wrote.
        parts: Products of 32 and 64 bits are summed in so many partial sums; 1 leaves them as the
            processor has them.
    """
    values: dict[int, torch.Tensor] = dict(content["outside"])
    wanted = set(content["outputs"].values())
    last: dict[int, int] = {}
    for at, (_, args, kwargs, _, seed) in enumerate(content["operations"]):
        for number in (
            *_mentioned([args, list(kwargs.values())]),
            *([] if seed is None else [seed]),
        ):
            last[number] = at
    ends: dict[int, list[int]] = {}
    for number, at in last.items():
        if number not in wanted:
            ends.setdefault(at, []).append(number)
    with torch.no_grad():
        for at, (name, args, kwargs, results, seed) in enumerate(content["operations"]):
            if seed is not None:
                torch.set_rng_state(values[seed])
            given = [_decoded(value, values) for value in args]
            named = {key: _decoded(value, values) for key, value in kwargs.items()}
            in_parts = parts > 1 and _is_wide_product(name, given)
            run = partial(_in_parts, parts) if in_parts else _run
            made = run(_operator(name), given, named)
            for number, value in zip(results, _flat(made), strict=True):
                if number >= 0 and (number in last or number in wanted):
                    values[number] = value
            for number in ends.get(at, ()):
                values.pop(number, None)
    return {name: values[number] for name, number in content["outputs"].items()}


def _run(operator: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    return operator(*args, **kwargs)


# --- sums in another order ------------------------------------------------------------------------

PROBES = ((1, 128, 512), (258, 256, 4), (128, 387, 4), (64, 300, 70))
"""Rows, terms and columns of `products`: one row, few columns (what convolutions of short sounds
come to), and neither. A library chooses among its kernels by shape, and not all obey a limit: on
an EPYC 9004, MKL 2024.2 gave the same bits for few columns under each of its variables."""

_PRODUCTS = frozenset(
    f"aten::{name}" for name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv")
)
"""Operators whose last two arguments are multiplied; one before them is added."""


def products() -> list[str]:
    """What a few products are in this process, to the bit, in the order of `PROBES`."""
    found = []
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for rows, terms, columns in PROBES:
            made = _numbers(rows, terms) @ _numbers(terms, columns)
            found.append(sha256(bytes(made.flatten().view(torch.uint8).tolist())).hexdigest()[:16])
    return found


def _numbers(rows: int, columns: int) -> torch.Tensor:
    """Numbers from -1 to 1 that no instruction set computes otherwise."""
    count = torch.arange(1, rows * columns + 1, dtype=torch.int64, device="cpu")
    mixed = count * 0x9E3779B1 % 2**24  # of 24 bits: exact in float32
    return (mixed.to(torch.float32) / 2**23 - 1).view(rows, columns)


def _is_wide_product(name: str, args: list[Any]) -> bool:
    """Whether it sums products in its own precision; narrower ones would be rounded once more."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    known = name in _PRODUCTS or name == "aten::convolution"
    return known and all(t.dtype in (torch.float32, torch.float64) for t in tensors)


def _in_parts(
    parts: int, operator: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> torch.Tensor:
    """A product, each partial sum of every `parts`-th term."""
    if operator is torch.ops.aten.convolution.default:
        return _convolved_in_parts(parts, operator, args)
    *added, first, second = args
    made: torch.Tensor | None = None
    for part in range(parts):
        terms = slice(part, None, parts)
        factors = first[..., terms], second[terms] if second.ndim == 1 else second[..., terms, :]
        if made is None:
            made = operator(*added, *factors, **kwargs)
        elif added:
            made = operator(made, *factors, **(kwargs | {"beta": 1}))
        else:
            made = made + operator(*factors)
    assert made is not None
    return made


def _convolved_in_parts(parts: int, operator: Callable[..., Any], args: list[Any]) -> torch.Tensor:
    """By weights of which all other terms are zero: channels and taps are terms alike."""
    values, weight, bias, *how = args
    transposed = how[3]
    shape = list(weight.shape)
    shape[1 if transposed else 0] = 1  # the outputs
    terms = torch.arange(math.prod(shape)).view(shape) % parts
    made: torch.Tensor = operator(values, weight.where(terms == 0, 0), bias, *how)
    for part in range(1, parts):
        made = made + operator(values, weight.where(terms == part, 0), None, *how)
    return made


# --------------------------------------------------------------------------------------------------


def _operator(name: str) -> Callable[..., Any]:
    namespace, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, namespace), operator)
    chosen: Callable[..., Any] = getattr(found, overload or "default")
    return chosen


def _mentioned(value: Any) -> list[int]:
    if isinstance(value, list):
        if len(value) == 2 and value[0] in ("tensor", "generator"):
            return [value[1]]
        return [number for item in value for number in _mentioned(item)]
    return []


def _decoded(value: Any, values: Mapping[int, torch.Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "tensor":
        return values[rest[0]]
    if kind == "generator":
        generator = torch.Generator("cpu")
        generator.set_state(values[rest[0]])
        return generator
    if kind == "list":
        return [_decoded(item, values) for item in rest[0]]
    if kind == "complex":
        return complex(*rest)
    if kind == "device":
        return torch.device(rest[0])
    return getattr(torch, rest[0])


def main() -> None:
    """Play tapes as they are asked for, by lines of source and target, until nobody asks more."""
    import select
    import sys

    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        source, target = line.rstrip("\n").split("\t")
        try:
            content = torch.load(source, weights_only=True, mmap=True)
            flags = content["flags"]
            torch.set_num_threads(flags["threads"])
            torch.set_float32_matmul_precision(flags["matmul_precision"])
            torch.backends.mkldnn.set_flags(flags["mkldnn"])
            same = any(map(eq, flags["products"], products()))  # the limit does not hold for all
            made = play(content, parts=flags["parts"] if same else 1)
            torch.save({name: tensor.clone() for name, tensor in made.items()}, target)
            answer = MADE
        except Exception as error:  # whatever an operator raises here, the asking side says
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        print(answer, flush=True)


if __name__ == "__main__":
    main()

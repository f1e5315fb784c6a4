"""What a run takes, told without computing it.

The code of the subject runs, and its schedulers do; its models do not. They are given tensors that
have a shape and no content (torch's fake tensors), so that every call's work, memory and outputs'
sizes are known, and no weight is read. What goes on from there is filled with one number each.
"""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from truestep.calls.arguments import Arguments, arguments_of
from truestep.calls.boundaries import Arrival, watching
from truestep.calls.classes import Kind
from truestep.calls.rebuilding import Swaps, laid_over
from truestep.calls.recorder import Recorder, held_tensors, placed, weight_dtype
from truestep.calls.recording import content_name, host_copy
from truestep.calls.subject import Subject
from truestep.calls.values import Path, encode
from truestep.errors import FOREIGN, UsageError, one_line
from truestep.randomness import own_randomness
from truestep.recording.manifest import CallEntry


@dataclass(frozen=True)
class Work:
    """What one call of a model takes.

    Attributes:
        flops: Multiplications and additions of its products, two each.
        weights: Bytes of weights that it reads.
        activations: Most bytes that are alive at once beside weights and inputs.
        dtype: Of its weights.
    """

    flops: int
    weights: int
    activations: int
    dtype: str


@dataclass(frozen=True)
class Foretold:
    """A run that was not computed.

    Attributes:
        calls: In the order in which they begin; trees name tensors by their content.
        sizes: Bytes of every tensor, by that name.
        works: By the place in `calls` of each call of a model.
        weights: Bytes of all weights of each component, and of the largest of them.
    """

    calls: tuple[CallEntry, ...]
    sizes: Mapping[str, int]
    works: Mapping[int, Work]
    weights: Mapping[str, tuple[int, int]]

    @property
    def steps(self) -> int:
        """Number of denoise steps."""
        return max((call.step + 1 for call in self.calls if call.step is not None), default=0)


@own_randomness()
def foretold(subject: Subject) -> Foretold:
    """Tell what a run takes, without running its models.

    Args:
        subject: What would run. Its weights are never read, and may be stand-ins; what its models
            keep of a run is spoiled, so it is not to be run afterwards.

    Raises:
        UsageError: A model looks at numbers to decide what it does, or cannot be run at all.
    """
    teller = _Teller()
    with watching(subject, teller), torch.no_grad():
        output = subject.run()
    teller.keep_run(output)
    calls, places = placed(teller)
    works = {new: teller.works[old] for new, old in enumerate(places) if old in teller.works}
    return Foretold(tuple(calls), teller.sizes, works, weight_sizes(subject.components))


def weight_sizes(components: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes of all weights of each module among components, and of the largest of them."""
    found = {}
    for name, part in components.items():
        if isinstance(part, torch.nn.Module):
            sizes = [p.numel() * p.itemsize for p in part.parameters()]
            found[name] = (sum(sizes), max(sizes, default=0))
    return found


@dataclass
class _Teller(Recorder):
    """Keeps calls as a recorder does, of models that are not run, and of tensors their sizes."""

    works: dict[int, Work] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    _known: dict[str, tuple[Any, Work]] = field(default_factory=dict)
    _numbers: random.Random = field(default_factory=lambda: random.Random(0))

    def __call__(self, arrival: Arrival) -> Any:
        if arrival.kind is not Kind.MODEL:
            return super().__call__(arrival)
        proceed = partial(self._told_of, arrival, len(self.calls))
        return super().__call__(replace(arrival, proceed=proceed))

    def keep(self, path: Path, tensor: torch.Tensor) -> str:
        copy = host_copy(tensor)
        name = content_name(copy)
        self.sizes[name] = copy.nbytes
        return name

    def _told_of(self, arrival: Arrival, place: int, *args: Any, **kwargs: Any) -> Any:
        """Work out a call of a model; one like an earlier one is not worked out again."""
        alike = f"{arrival.component} {arrival.method} {_shapes(arguments_of(arrival))}"
        if alike not in self._known:
            self._known[alike] = self._worked_out(arrival, args, kwargs)
        output, self.works[place] = self._known[alike]
        with patch.object(FakeTensor, "__deepcopy__", lambda t, memo: self._filled(t, memo)):
            return copy.deepcopy(output)

    def _worked_out(
        self, arrival: Arrival, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Work]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given = held_tensors((args, kwargs)).values()
        emptied = {id(t): mode.from_tensor(t) for t in given if not isinstance(t, FakeTensor)}
        back = {id(emptied[id(t)]): t for t in given if id(t) in emptied}
        args, kwargs = laid_over((tuple(args), dict(kwargs)), Swaps(emptied))
        alive, counter = _Alive(), FlopCounterMode(display=False)
        try:
            with mode, counter, alive:
                output = arrival.proceed(*args, **kwargs)
        except FOREIGN as error:
            raise UsageError(
                f"{arrival.component}.{arrival.method} cannot be foretold",
                measured=one_line(error)[:200],
                likely="what it does depends on the numbers that it is given",
                hint="leave --dry-run out",
            ) from error
        finally:
            laid_over((args, kwargs), Swaps(back))
        owner = arrival.owner
        weights = list(owner.parameters()) if isinstance(owner, torch.nn.Module) else []
        work = Work(
            flops=counter.get_total_flops(),
            weights=sum(p.numel() * p.itemsize for p in weights),
            activations=alive.most,
            dtype=weight_dtype(owner) or "float32",
        )
        return output, work

    def _filled(self, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        """A tensor that is one number, another one each time, and takes no memory."""
        number = self._numbers.uniform(0.25, 1.0) if tensor.is_floating_point() else 1
        filled = torch.tensor(number, dtype=tensor.dtype).expand(tensor.shape)
        memo[id(tensor)] = filled
        return filled


def _shapes(arguments: Arguments) -> str:
    """What says that two calls are alike: all of their arguments, but for numbers."""

    def shape(path: Path, tensor: torch.Tensor) -> str:
        return f"{tensor.dtype} {tuple(tensor.shape)}"

    given = {n: v for n, v in arguments.values.items() if type(v) is not float}
    return repr({name: encode(value, shape) for name, value in given.items()})


class _Alive(TorchDispatchMode):
    """Bytes of what was made and is alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._sizes: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, FakeTensor):
                self._sizes.setdefault(value.untyped_storage(), 0)  # it was there before
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, FakeTensor):
                self._made(value.untyped_storage())
        return output

    def _made(self, storage: torch.UntypedStorage) -> None:
        if storage in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[storage] = size
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self._now -= size

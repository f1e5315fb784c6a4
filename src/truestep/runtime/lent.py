"""Weights that are there only while they are used: widened from narrower ones, or read from disk.

In the place of such a weight stands a single element, expanded to the weight's shape, in the dtype
and on the device that the weight seems to have; parameters stay the objects that they were. A
function that is given one is given the weight itself, made for this call. Once something writes
into a weight or keeps a view of it, the weight stays, so that all code does what it would do with
weights in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from truestep.measure.distance import same_bits
from truestep.runtime.buffers import (
    Buffers,
    address,
    holders_of,
    is_transformed,
    out_of_transforms,
    place_of,
)
from truestep.runtime.reached import reached
from truestep.runtime.weight import Lent, Resident, cast

LEAST = 1 << 20
"""Bytes of a weight from which on it is lent: smaller ones are beside nothing."""


_T = torch.Tensor

_AS_IT_IS = frozenset(
    {
        *(_T.detach, _T.requires_grad_, _T.__hash__, _T.__len__, _T.dim, _T.ndimension, _T.size),
        *(_T.numel, _T.nelement, _T.element_size, _T.is_floating_point, _T.is_complex),
        *(_T.is_signed, _T.get_device, _T.is_pinned, _T.is_shared, _T._is_view, _T.is_inference),
        *(torch.detach, torch.numel, torch.is_floating_point, torch.is_complex),
    }
)
"""Functions that ask for no value, or give the same weight as another object."""

_COMPARES_TYPES = torch._has_compatible_shallow_copy_type
"""What `Module.to` asks of a weight and of itself; apart, as dynamo cannot find it in a set."""

_LAYOUT = frozenset({_T.stride, _T.is_contiguous, _T.storage_offset})
"""Functions that ask how a weight lies in memory."""

_VIEWS = frozenset({"T", "H", "mT", "mH", "real", "imag"})
"""Properties that are values; all others are answered by what stands in for a weight."""

_MEMORY = frozenset(
    {_T.numpy, _T.storage, _T.untyped_storage, _T.data_ptr, _T.__array__, _T.__dlpack__}
)
"""Functions that hand out the memory of a weight."""

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types of weights that are lent: a class of its own may keep its values elsewhere."""


class _Known(NamedTuple):
    """A weight, and the element that stands in for it.

    Attributes:
        one: The element.
        weight: The weight.
        holders: How many hold the memory of the element where nobody has a stand-in.
    """

    one: torch.Tensor
    weight: Lent
    holders: int


def _is_held(known: _Known) -> bool:
    """Whether somebody has a stand-in."""
    return holders_of(known.one) > known.holders


class Lender(TorchFunctionMode):
    """While it is on, functions that are given a stand-in are given the weight.

    It is on in the thread that entered it, and in what that gives others to do; see `lending`.

    Attributes:
        stored: Weights that stayed in files, by where they are, and their bytes.
        resident: What lets the model that runs stay in memory, if anything does.
        loaded: How often something was loaded: what is loaded twice is two models.
        buffers: Memory that weights are made in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lent: dict[int, _Known] = {}
        self._loading = False
        self._reach = ExitStack()
        self.stored: dict[object, int] = {}
        self.resident: Resident | None = None
        self.loaded = 0
        self.buffers = Buffers()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What is compiled is not lent; to keep dynamo out costs more than most operators."""
        return False

    def lend(self, weight: Lent) -> torch.Tensor:
        """What stands in the place of a weight."""
        with torch._C.DisableTorchFunction():
            one = torch.empty(
                (1,) * weight.like.ndim, dtype=weight.like.dtype, device=weight.device
            )
            one.view(torch.uint8).fill_(255)  # NaN, for code that this does not see
            alone = holders_of(one)
            stand_in = one.expand(weight.like.shape)
            self._lent[one.data_ptr()] = _Known(one, weight, alone)
        return stand_in

    @property
    def lends(self) -> bool:
        """Whether there is any weight that it lends."""
        return bool(self._lent)

    def lent(self, value: object) -> Lent | None:
        """The weight that a tensor stands in for, if it does.

        Raises:
            RuntimeError: It stands for a part of one, taken where nobody saw it.
        """
        if type(value) not in _PLAIN or not self._lent:
            return None
        with torch._C.DisableTorchFunction():
            found = self._lent.get(address(value))
            if found is None:
                return None
            if value.shape != found.weight.like.shape or is_transformed(value):  # type: ignore
                raise RuntimeError("a part was taken of a weight that was not in memory then")
        return found.weight

    def forget(self) -> None:
        """Hold nothing of weights whose stand-ins nobody has any more."""
        with torch._C.DisableTorchFunction():
            self._lent = {at: known for at, known in self._lent.items() if _is_held(known)}

    def __enter__(self) -> Lender:
        """Lend in this thread, and in those that it gives something to do."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._reach.enter_context(reached(active))
        return self

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Lend in this thread, too."""
        if active() is not None:
            yield
            return
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        """Stand-ins that code has kept of weights in memory are those weights from now on."""
        self._reach.close()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunction(), torch.inference_mode(False):
            kept = {
                place: known.weight
                for place, known in self._lent.items()
                if known.weight.source is not None and _is_held(known)
            }
            alive = [each for each in gc.get_objects() if type(each) in _PLAIN] if kept else []
            weights: dict[int, torch.Tensor] = {}
            for each in alive:
                if each.layout is torch.strided and (place := address(each)) in kept:
                    weights.setdefault(place, kept[place].tensor())
                    each.data = weights[place]
        self._lent = {}

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Casts and copies of weights stay lent: what is loaded is used later."""
        before, self._loading = self._loading, True
        try:
            yield
        finally:
            self._loading = before

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function with the weights that it is given stand-ins of."""
        kwargs = kwargs or {}
        if not self._lent or func is _COMPARES_TYPES or func in _AS_IT_IS or _is_property(func):
            return func(*args, **kwargs)
        if self._loading and (func is _T.data_ptr or func in _COPIES):
            done, copy = self._copied(func, args, kwargs)
            if done:
                return copy
        borrowed = _Borrowed(self, of_layout=func in _LAYOUT)
        args = borrowed.given(args)
        kwargs = {name: borrowed.given(value) for name, value in kwargs.items()}
        made = func(*args, **kwargs)
        return borrowed.returned(made, outside=func in _MEMORY) if borrowed.loans else made

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether a function of a weight can be put off until it is used; and what it gives."""
        weight = self.lent(args[0])
        if weight is None or weight.kept is not None:
            return False, None
        if func is _T.data_ptr:  # asked while loading to see what is tied
            return True, func(args[0])
        target = _target(func, args[1:], kwargs)
        if target is None:
            return False, None
        device, dtype = target[0] or weight.device, target[1] or weight.like.dtype
        if func is not _T.clone and (device, dtype) == (weight.device, weight.like.dtype):
            return True, args[0]
        copied = cast(weight, dtype, device, self.buffers)
        copied.model, copied.stays, weight.stays = weight.model, weight.stays, None
        return True, self.lend(copied)


_CASTS = {
    _T.float: torch.float32,
    _T.double: torch.float64,
    _T.half: torch.float16,
    _T.bfloat16: torch.bfloat16,
}
_COPIES = frozenset({_T.to, _T.clone, _T.contiguous, _T.cpu, _T.cuda, *_CASTS})


def _target(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None] | None:
    """Device and dtype of what a copying function gives; None where its layout may be another."""
    if func is _T.to:
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return None
        known = {key: value for key, value in kwargs.items() if key != "copy"}
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **known)
        return None if layout is not None or kwargs.get("copy") else (device, dtype)
    if func in _CASTS and not (args or kwargs):
        return None, _CASTS[func]
    if func in (_T.clone, _T.contiguous) and not (args or kwargs):
        return None, None
    return (torch.device("cpu"), None) if func is _T.cpu and not (args or kwargs) else None


def _is_property(func: Any) -> bool:
    """Whether a function reads or sets a property that is no value of the tensor."""
    name = getattr(func, "__name__", "")
    if name not in ("__get__", "__set__", "__delete__"):
        return False
    return name != "__get__" or getattr(func.__self__, "__name__", "") not in _VIEWS


class _Loan(NamedTuple):
    """A weight that one call of a function is given.

    Attributes:
        stand_in: What was in its place.
        weight, tensor: It, and it in memory.
        version: Of the tensor, before the call.
        buffer: Where it lies, if in memory that others may have after the call.
        holders: How many hold that memory, before the call.
    """

    stand_in: torch.Tensor
    weight: Lent
    tensor: torch.Tensor
    version: int
    buffer: torch.Tensor | None
    holders: int

    def reshaped(self) -> bool:
        """Whether a function gave the weight another form in place; then it is as it is now.

        That goes for the object that the function was given: others of the weight have its form.
        """
        like, tensor = self.weight.like, self.tensor
        if (tensor.shape, tensor.stride()) == (like.shape, like.stride()):
            return False
        with torch._C.DisableTorchFunction():
            if self.buffer is not None and place_of(tensor) == place_of(self.buffer):
                self.weight.kept = tensor.detach().as_strided(
                    like.shape, like.stride(), tensor.storage_offset()
                )
            elif place_of(tensor) == place_of(self.weight.resident):
                self.weight.kept = self.weight.resident
            self.stand_in.data = tensor
        return True


@dataclass
class _Borrowed:
    """The weights that one call of a function is given."""

    lender: Lender
    of_layout: bool = False
    loans: list[_Loan] = field(default_factory=list)

    def given(self, value: Any) -> Any:
        """A value with weights in the places of stand-ins, in lists and tuples too."""
        if isinstance(value, list | tuple):
            parts = [self.given(part) for part in value]
            same = all(a is b for a, b in zip(parts, value, strict=True))
            return value if same else parts if isinstance(value, list) else tuple(parts)
        weight = self.lender.lent(value)
        if weight is None:
            return value
        if self.of_layout:
            return weight.like
        return self._lent(value, weight)

    def _lent(self, stand_in: torch.Tensor, weight: Lent) -> torch.Tensor:
        for loan in self.loans:
            if loan.weight is weight:  # given twice
                tensor = _as_leaf(loan.tensor, stand_in.requires_grad)
                self.loans.append(loan._replace(stand_in=stand_in, tensor=tensor, buffer=None))
                return tensor
        buffers = self.lender.buffers
        mode = _get_current_dispatch_mode()
        with out_of_transforms():
            if getattr(mode, "of_weights", False) and weight.source is not None:
                tensor, buffer = weight.tensor(), None
            else:
                buffer = None
                if weight.come() is None and weight.device.type == "cpu":
                    buffer = buffers.take(weight.room)
                with _disable_current_modes():
                    tensor = weight.tensor(buffer)
            tensor = _as_leaf(tensor, stand_in.requires_grad)
        holders = 0 if buffer is None else holders_of(buffer)
        self.loans.append(_Loan(stand_in, weight, tensor, tensor._version, buffer, holders))
        return tensor

    def returned(self, made: Any, *, outside: bool) -> Any:
        """What a function gave, with stand-ins for whole weights; what is still held stays."""
        parts = list(made) if isinstance(made, list | tuple) else [made]
        places = [place_of(part) for part in parts if not any(part is x.tensor for x in self.loans)]
        result = made
        for loan in self.loans:
            if made is loan.tensor:
                result = loan.stand_in
            written = outside or loan.tensor._version != loan.version
            if loan.reshaped():
                result = loan.stand_in if made is loan.tensor else result
            elif written or place_of(loan.tensor) in places:
                loan.weight.kept = loan.tensor
        del parts, made
        for loan in self.loans:
            buffer = loan.buffer
            if buffer is None or loan.weight.kept is not None:
                continue
            if holders_of(buffer) == loan.holders:  # else somebody keeps it, for a gradient perhaps
                self.lender.buffers.give_back(buffer)
        return result


def _as_leaf(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A weight that asks for a gradient or not: without gradients, too, kernels depend on it."""
    same = tensor.requires_grad == requires_grad
    return tensor if same else tensor.detach().requires_grad_(requires_grad)


@contextmanager
def lending() -> Iterator[Lender]:
    """The lender of this thread: the one that is on, or a new one while this lasts."""
    lender = active()
    if lender is not None:
        yield lender
        return
    with Lender() as lender:
        yield lender


def active() -> Lender | None:
    """The lender that is on in this thread."""
    modes = _get_current_function_mode_stack()
    return next((mode for mode in modes if isinstance(mode, Lender)), None)


def content_of(tensor: torch.Tensor) -> object:
    """What says which weight a stand-in is of; None of a tensor in memory, or changed since."""
    lender = active()
    weight = None if lender is None else lender.lent(tensor)
    if weight is None or weight.content is None:
        return None
    if weight.kept is not None:
        original = replace(weight, kept=None, resident=None).tensor()
        return weight.content if same_bits(weight.kept, original) else None
    return weight.content


def lendable(module: torch.nn.Module, tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight of a module can be lent in a dtype: it is large, and all code that reads it
    can be seen."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # it is dense
        and tensor.numel() * dtype.itemsize >= LEAST
        and not isinstance(module, torch.jit.ScriptModule | torch.nn.DataParallel)
    )

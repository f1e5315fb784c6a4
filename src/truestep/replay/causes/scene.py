"""What a hypothesis is tried on: one call of a module that is wrong, on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from truestep.floors import NoiseFloor
from truestep.judge.divergence import ROOT
from truestep.judge.floor import Limits, pair_of
from truestep.judge.rows import compare_tensors
from truestep.keys import key_of
from truestep.measure.distance import distance
from truestep.measure.plain import plain
from truestep.nests import leaves
from truestep.pairing.naming import named_modules
from truestep.pairing.partners import Names, Part, Partners, namesake
from truestep.replay.isolation import Flow, Forward, benign_flows, flow, heard, laid_out
from truestep.runtime.precision import working_dtype

Tensor = torch.Tensor
Outputs = Mapping[str, Tensor]

EXPLAINED = 0.1
"""Share of the error that may be left once a cause is undone; what is left is at the floor, too."""


@dataclass(frozen=True)
class Hypothesis:
    """One way in which the trusted module could be what the candidate is.

    Attributes:
        kind: Of what sort, in few words: `epsilon`.
        text: What is wrong with the candidate, with its values.
        change: Makes the trusted module wrong in this way for as long as it is entered.
        patch: What mends the candidate, where that is one line.
        line: Of the trusted code, `file:line`, where it is about one.
        again: The module runs a second time, on what it gave.
        said: Gives kind and text where to say them costs something; asked once it is accepted.
        grid: The precision that what the candidate gives has to be in, bit for bit; a result that
            another computed is rounded to a neighbour now and then.
    """

    kind: str
    text: str
    change: Callable[[torch.nn.Module], AbstractContextManager[Any]]
    patch: str = ""
    line: str = ""
    again: bool = False
    said: Callable[[], tuple[str, str]] | None = None
    grid: torch.dtype | None = None


@dataclass
class Scene:
    """One call of a module on what the reference gave it.

    Attributes:
        fqn: The module, as the trusted model names it.
        own: The candidate's, where one module answers to it.
        part: Which part of its outputs, where it is fused.
        theirs: The trusted one.
        args, kwargs: Of the trusted call.
        actual, expected: What the two gave, by slot (`out`, `out.1`), host copies.
        limits: How the two are judged.
        state: All parameters and buffers of the trusted model by name.
        tried: Hypotheses so far.
    """

    fqn: str
    own: torch.nn.Module | None
    part: Part | None
    theirs: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    actual: Outputs
    expected: Outputs
    limits: Limits
    state: Mapping[str, Tensor]
    tried: int = field(default=0)

    def within(self, name: str) -> str:
        """What something in the module is called in the whole model, as torch names it."""
        return ".".join(part for part in (self.fqn, name) if part not in ("", ROOT))

    def run(self, *, again: bool = False) -> Outputs:
        """What the trusted module gives now, host copies; it is afterwards what it was.

        Args:
            again: Run it a second time, on what it gave.
        """
        args, kwargs = copied((self.args, dict(self.kwargs)))
        with torch.no_grad(), untouched(self.theirs):
            made = self.theirs(*args, **kwargs)
            if again:
                first = made[0] if isinstance(made, tuple) else made
                made = self.theirs(first, *args[1:], **kwargs)
        return {slot: plain(t).cpu().clone() for slot, t in leaves(made, "out")}

    def error(self, made: Outputs) -> float:
        """Distance of the candidate's outputs from some others; inf where they are no match."""
        worst = 0.0
        for slot, actual in self.actual.items():
            other = made.get(slot)
            laid = None if other is None else laid_out(actual, other)
            if other is None or laid is None:
                return float("inf")
            found = distance(laid.float(), other.float())
            worst = max(worst, found.rel_l2 if found.count == other.numel() else float("inf"))
        return worst if self.actual else float("inf")

    def agrees(self, made: Outputs) -> bool:
        """Whether the candidate gave these outputs, to the floor."""
        pairs = {s: (laid_out(a, made[s]), made[s]) for s, a in self.actual.items() if s in made}
        if len(pairs) != len(self.actual) or any(laid is None for laid, _ in pairs.values()):
            return False
        rows = compare_tensors(
            {self._name(slot): laid for slot, (laid, _) in pairs.items() if laid is not None},
            {self._name(slot): other for slot, (_, other) in pairs.items()},
            limits=self.limits,
        )
        return bool(rows) and all(row.verdict.passed for row in rows)

    def explains(self, hypothesis: Hypothesis, made: Outputs, before: float) -> bool:
        """Whether what the trusted module gives under a hypothesis is what the candidate gave.

        Args:
            before: The error without it.
        """
        if self.error(made) > EXPLAINED * before:
            return False
        grid = hypothesis.grid
        if grid is not None and all(_is_on(grid, each) for each in self.actual.values()):
            return not all(_is_on(grid, each) for each in self.expected.values())
        return self.agrees(made)

    def _name(self, slot: str) -> str:
        return f"{self._head}{slot}"

    @property
    def _head(self) -> str:
        first = next(iter(self.limits.floor.runs)).tensors[0].name if self.limits.floor else ""
        return first[: len(first) - len(key_of(first).name)] if first else "module/x/0/main/"


def _is_on(grid: torch.dtype, tensor: Tensor) -> bool:
    return bool((tensor.to(grid).to(tensor.dtype) == tensor).all())


def mapped(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """A nest with its floating tensors changed."""
    return pytree.tree_map_only(Tensor, lambda t: change(t) if t.is_floating_point() else t, nest)


def copied(nest: Any) -> Any:
    """A nest with its tensors copied: a module may write into what it is given."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), nest)


@contextmanager
def parameters(module: torch.nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters or buffers of a module other values of the same sizes, for a while."""
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    kept = {name: named[name].detach().clone() for name in values}
    with torch.no_grad():
        try:
            for name, value in values.items():
                named[name].copy_(value.to(named[name].device))
            yield
        finally:
            for name, value in kept.items():
                named[name].copy_(value)


@contextmanager
def hooked(module: torch.nn.Module, *, before: Any = None, after: Any = None) -> Iterator[None]:
    """Have hooks with keywords on a module, for a while."""
    with ExitStack() as stack:
        if before is not None:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        if after is not None:
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def attribute(holder: object, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value, for a while."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def scenes_of(
    fqns: Sequence[str],
    place: tuple[int, str],
    candidate: Any,
    trusted: Any,
    partners: Partners | None,
) -> Iterator[Scene]:
    """The first calls of modules that a drill named, without those that cannot be looked at alone.

    Args:
        fqns: The modules, as the trusted model names them; both sides run once for all of them.
        place: Step and branch.
        candidate, trusted: The two `levels.Subject`s.
        partners: Which modules answer to which.
    """
    modules = named_modules(trusted.model).modules
    theirs = {fqn: modules[fqn] for fqn in fqns if fqn in modules}
    if not theirs:
        return
    given, calls = _trusted_calls(trusted.model, trusted.forward, theirs, place)
    names: Names = namesake if partners is None else partners.candidate
    if candidate.before is not None:
        candidate.before()
    made = flow(
        candidate.model, candidate.forward, place=place, given=given, select=theirs, parts=names
    )
    working = str(working_dtype(trusted.model) or torch.float32).removeprefix("torch.")
    benign = benign_flows(
        trusted.model, trusted.forward, given, place=place, select=theirs, working=working
    )
    limits = Limits(NoiseFloor(runs=tuple(benign)), pair_of(working, working))
    for fqn, (args, kwargs) in calls.items():
        yield _scene(fqn, (args, kwargs), (made, given), (candidate, trusted), names, limits)


def _scene(
    fqn: str,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    flows: tuple[Flow, Flow],
    sides: tuple[Any, Any],
    names: Names,
    limits: Limits,
) -> Scene:
    """The scene of one module, of flows and limits of several."""
    outs = [
        {key_of(n).name: t for n, t in side.tensors.items() if _is_output(n, fqn)} for side in flows
    ]
    candidate, trusted = sides
    ours = named_modules(candidate.model).modules
    parts = [(n, part) for n in ours for part in names(n) if part.fqn == fqn]
    own, part = parts[0] if len(parts) == 1 else (None, None)
    return Scene(
        fqn=fqn,
        own=None if own is None else ours[own],
        part=part,
        theirs=named_modules(trusted.model).modules[fqn],
        args=call[0],
        kwargs=call[1],
        actual=outs[0],
        expected=outs[1],
        limits=replace(limits, floor=_of_outputs(limits.floor or NoiseFloor(), fqn)),
        state={n: t for n, t in trusted.model.state_dict().items() if isinstance(t, Tensor)},
    )


def _of_outputs(floor: NoiseFloor, fqn: str) -> NoiseFloor:
    """A floor with what the module gives alone."""
    runs = tuple(
        run.model_copy(update={"tensors": tuple(t for t in run.tensors if _is_output(t.name, fqn))})
        for run in floor.runs
    )
    return floor.model_copy(update={"runs": tuple(run for run in runs if run.tensors)})


def _is_output(name: str, fqn: str) -> bool:
    """Whether a tensor is one that the first call of a module gave."""
    key = key_of(name)
    return key.label == fqn and key.name.partition(".")[0] == "out"


def _trusted_calls(
    model: torch.nn.Module,
    forward: Forward,
    modules: Mapping[str, torch.nn.Module],
    place: tuple[int, str],
) -> tuple[Flow, dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The flow of a trusted forward, and the arguments of the first call of each module."""
    kept: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with ExitStack() as stack:
        for fqn, module in modules.items():

            def keep(_: Any, args: Any, kwargs: Any, fqn: str = fqn) -> None:
                if heard() and fqn not in kept:
                    kept[fqn] = copied((args, kwargs))

            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        given = flow(model, forward, place=place, select=modules)
    return given, kept


def outcome(scene: Scene, hypothesis: Hypothesis) -> Outputs | None:
    """What the trusted module gives under a hypothesis; None where it cannot be run so."""
    scene.tried += 1
    made: Outputs | None = None
    # code that is called as nobody meant it may raise anything: no explanation then
    with suppress(Exception), hypothesis.change(scene.theirs):
        made = scene.run(again=hypothesis.again)
    return made


@contextmanager
def untouched(module: torch.nn.Module) -> Iterator[None]:
    """Put back what a module writes on itself while it runs: counters, tables, running means."""
    kept = [
        (each, dict(vars(each)), dict(each._buffers), [b.clone() for b in _held(each)])
        for each in module.modules()
    ]
    try:
        yield
    finally:
        for each, attributes, buffers, values in kept:
            for name in set(vars(each)) - set(attributes):
                del each.__dict__[name]
            each.__dict__.update(attributes)
            each._buffers.clear()
            each._buffers.update(buffers)
            with torch.no_grad():
                for buffer, value in zip(_held(each), values, strict=True):
                    buffer.copy_(value)


def _held(module: torch.nn.Module) -> list[Tensor]:
    return [b for b in module._buffers.values() if b is not None and not b.is_meta]

"""A candidate of which only a recording is here: what its modules were given and gave, once.

The drill then turns round: the trusted model's modules are run on what the candidate's were given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from truestep.keys import key_of
from truestep.measure.distance import distance
from truestep.pairing.naming import ROOT, named_modules
from truestep.pairing.partners import Part, Partners
from truestep.replay.isolation import Flow
from truestep.replay.statements import Operator

SAME = 1e-6
"""Weights nearer than this are the same: float32's rounding is 6e-8."""


@dataclass(frozen=True)
class Recorded:
    """A candidate's forward under the trusted model's names.

    Attributes:
        flow: What its modules were given and gave.
        weights: A module tree with its names and, as far as they were kept, its weights.
        written: Of its modules' names, where their code is written: `port.Layer at model.py:156`.
        operators: By its own names; see `statements.operators`. Empty where none were recorded.
        unread: By name, elements on which the trusted model's result does not depend.
    """

    flow: Flow
    weights: torch.nn.Module
    written: Mapping[str, str] = field(default_factory=dict)
    operators: Callable[[str], list[Operator]] = lambda name: []
    unread: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def own(self, fqn: str, partners: Partners | None) -> str | None:
        """The candidate's module that answers to a trusted one, where it is a whole one."""
        names = [
            name
            for name in named_modules(self.weights).modules
            if (name == ROOT) == (fqn == ROOT)
            and any(part.fqn == fqn and part.rows is None for part in _answers(name, partners))
        ]
        return names[0] if len(names) == 1 else None

    def within(self, select: Collection[str], reference: Flow) -> Flow:
        """What is known of some modules, as far as the trusted ones give it, too."""
        kept = {
            name: tensor
            for name, tensor in self.flow.tensors.items()
            if name in reference.tensors and (key_of(name).fqn or ROOT) in (*select, ROOT)
        }
        calls = [c for c in self.flow.calls if c.partition("#")[0] in select or c == ROOT]
        return replace(self.flow, tensors=kept, calls=calls)

    def read(
        self, name: str, actual: torch.Tensor, expected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors of a name, equal where nothing reads them."""
        idle = self.unread.get(name)
        if idle is None or idle.numel() != expected.numel() or actual.numel() != expected.numel():
            return actual, expected
        alike = expected.reshape(actual.shape).to(actual.dtype)
        return torch.where(idle.reshape(actual.shape), alike, actual), expected

    def unseen(self, reference: Flow) -> list[str]:
        """Tensors of the trusted side that were not recorded of the candidate."""
        return [name for name in reference.tensors if name not in self.flow.tensors]

    def told(
        self, fqn: str, trusted: torch.nn.Module | None, partners: Partners | None
    ) -> str | None:
        """Which of a module's weights differ, and where the candidate's code is written."""
        modules = named_modules(self.weights).modules
        answering = [
            (name, part)
            for name in modules
            for part in _answers(name, partners)
            if part.fqn == fqn or (fqn == ROOT and name == ROOT)
        ]
        if not answering:
            return None
        apart = _apart(modules[answering[0][0]], trusted, answering[0][1]) if trusted else []
        where = [self.written[name] for name, _ in answering if name in self.written]
        return "; ".join([", ".join(apart)] * bool(apart) + where[:1]) or None


def _answers(name: str, partners: Partners | None) -> tuple[Part, ...]:
    if name == ROOT or partners is None:
        return (Part(name),)
    return partners.candidate(name)


def _apart(own: torch.nn.Module, trusted: torch.nn.Module, part: Part) -> list[str]:
    """What differs of weights that both sides call alike."""
    ours = dict(own.named_parameters(recurse=False))
    found = []
    for name, theirs in trusted.named_parameters(recurse=False):
        if name not in ours:
            sizes = {_rows(tensor, part).numel() for tensor in ours.values()}
            if ours and theirs.numel() not in sizes:  # else it is called otherwise
                found.append(f"{name} is missing")
            continue
        held = _rows(ours[name].detach(), part)
        if held.is_meta or theirs.is_meta:
            continue
        if held.shape != theirs.shape:
            found.append(f"{name} has shape {list(held.shape)} for {list(theirs.shape)}")
            continue
        size = distance(held, theirs.detach()).rel_l2
        if size > SAME and held.dtype == theirs.dtype:
            found.append(f"{name} differs by {size:.2g}")
    return found


def _rows(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """A part's rows of a fused weight."""
    if part.rows is None or not tensor.ndim or len(tensor) <= max(part.rows):
        return tensor
    return tensor[list(part.rows)]

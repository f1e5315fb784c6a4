"""Where inside of a prediction ranks part from the trusted model, and the collective before that.

The trusted model is run on the gathered inputs with everything it makes kept. What ranks made of
the same is held against it in the order in which it was made; the first that is wrong is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from truestep.engines.branches import named_by_text
from truestep.engines.predictions import trusted_call
from truestep.engines.ranks import events as happening
from truestep.engines.ranks.collectives import broken, exchanged, uneven_share
from truestep.engines.ranks.events import Event, happened, without_prefix
from truestep.engines.ranks.gathering import Gathered
from truestep.engines.ranks.layouts import Held, Layouts
from truestep.engines.ranks.tracing import ATTENTION, Part, trusted_parts
from truestep.engines.run import Run
from truestep.engines.trusted import Trusted

UNRECORDED = "modules were not recorded: truestep engine run --depth modules -- ..."

POINT_TO_POINT = ("send", "recv", "isend", "irecv", "permute_tensor")


@dataclass(frozen=True)
class Located:
    """The first place inside of a prediction that is wrong.

    Attributes:
        where: What it is.
        how: What is wrong with it.
        after: The last that is right.
        collective: The collective that it follows, with nothing right between; None for none.
        before: The last collective of all before it.
        layouts: How ranks share what comes before, in words.
    """

    where: str
    how: str
    after: str
    collective: Event | None
    before: Event | None
    layouts: tuple[str, ...]

    def notes(self) -> list[str]:
        """As it stands in results."""
        told = [f"ranks: {layout}" for layout in self.layouts]
        right = f", after {self.after} which is right" if self.after else ""
        told.append(f"first wrong on the ranks: {self.where}{right}: {self.how}")
        if self.collective is not None:
            told.append(f"the collective before it: {self.collective.label}")
        else:
            told.append(f"no collective between these{_last(self.before)}")
        return told


def _last(before: Event | None) -> str:
    return f"; the last before both: {before.label}" if before is not None else ""


def locate(
    gathered: Gathered, known: Run | None, trusted: Trusted, step: int, branch: str
) -> Located | None:
    """The first wrong place inside of a prediction.

    Args:
        gathered: The run of all ranks.
        known: The trusted pipeline's run, if there is one.
        trusted: The trusted side.
        step: Number of the step.
        branch: Of the prediction.

    Returns:
        None where nothing inside was recorded.
    """
    run = named_by_text(gathered.run, known)
    index = next(i for i, one in enumerate(run.steps) if one.number == step)
    branches = [one.branch for one in run.steps[index].passes]
    place = branches.index(branch) if branch in branches else 0
    if (step, place) not in gathered.sources:
        return None
    events, rows = happened(gathered, step, place)
    if not any(not event.is_collective for event in events):
        return None
    with torch.no_grad():
        denoiser, tensors = trusted_call(run, known, trusted, index, place)
        parts = trusted_parts(denoiser, tensors)
    outputs = {
        rank: gathered.runs[rank].steps[index].passes[at].output
        for rank, at in gathered.sources[step, place].items()
    }
    return _Walk(gathered, events, parts, outputs, rows).first()


class _Walk:
    """Goes through what happened, and stops at the first that is wrong."""

    def __init__(
        self,
        gathered: Gathered,
        events: Sequence[Event],
        parts: Sequence[Part],
        outputs: dict[int, torch.Tensor],
        rows: dict[int, tuple[int, int]],
    ) -> None:
        self._gathered, self._events, self._outputs = gathered, events, outputs
        self._parts = {(part.module, part.number): part for part in parts if part.what == "output"}
        self._attention = [part for part in parts if part.what in ATTENTION]
        self._ranks, self._rows = tuple(sorted(outputs)), rows
        self._alone = all(many == 1 for _, many in rows.values())
        names = {module: None for module, _ in self._parts}
        modules = [event.name for event in events if not event.is_collective]
        self._prefix = without_prefix(modules, names)
        self._layouts = Layouts()
        self._layouts.groups = [event.ranks for event in events if event.is_collective]
        self._told: dict[str, None] = {}

    def first(self) -> Located | None:
        """The first wrong place; the model's output where nothing before it is."""
        after, collective, before = "", None, None
        for event in self._events:
            if event.is_collective:
                held = self._given(event)
                if held is not None and not held.right:
                    where = f"what is given to {event.label}"
                    return self._located(where, held, after, collective, before)
                before = event
                held = self._made(event)
                collective = event
                if held is not None and not held.right:
                    where = f"what {event.label} makes"
                    return self._located(where, held, after, event, before)
                continue
            held = self._module(event)
            if held is None or not held.known:
                continue
            label = self._label(event)
            if not held.right:
                return self._located(label, held, after, collective, before)
            after, collective = label, None
            self._tell(label, held)
        part = self._parts.get(("", 0))
        held = self._layouts.held(part, self._outputs) if part is not None else None
        if held is None or not held.known or held.right:
            return None
        return self._located("the model's output", held, after, collective, before)

    def _located(
        self,
        where: str,
        held: Held,
        after: str,
        collective: Event | None,
        before: Event | None,
    ) -> Located:
        return Located(where, held.how, after, collective, before, tuple(self._told))

    def _label(self, event: Event) -> str:
        name = event.name.removeprefix(self._prefix)
        return f"`{name}`" if name else "the model's output"

    def _tell(self, label: str, held: Held) -> None:
        """A layout, once, at the first module that has it."""
        kind = held.how.partition(" (")[0]
        if not any(told.partition(": ")[2].startswith(kind) for told in self._told):
            self._told[f"{label}: {held.how}"] = None

    def _module(self, event: Event) -> Held | None:
        part = self._parts.get((event.name.removeprefix(self._prefix), event.number))
        made = happening.made(self._gathered, event)
        if part is None or not made:
            return None
        own = {rank: self._row(rank, value, part.value) for rank, value in made.items()}
        return self._layouts.held(part, own)

    def _row(self, rank: int, value: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Of a call that predicts for several branches, what is of this one."""
        row, many = self._rows[rank]
        if many == 1 or value.ndim != whole.ndim or not whole.ndim:
            return value
        own = whole.shape[0]
        return value[row * own : (row + 1) * own] if value.shape[0] == many * own else value

    def _around(self, event: Event) -> Iterator[Part]:
        """What the trusted model makes in the module that a collective is in, and just before."""
        inside = event.said("module").removeprefix(self._prefix)
        yield from (part for part in self._attention if part.module == inside)
        for (name, _), part in self._parts.items():
            if part.value.ndim > 1 and name and (name == inside or _parent(name) == inside):
                yield part

    def _given(self, event: Event) -> Held | None:
        if self._foreign(event) or not self._alone:
            return None
        shares = happening.given(self._gathered, event)
        reduces = "reduce" in event.name
        if not shares or event.name in ("broadcast", "scatter"):
            return None
        kept = self._layouts.kept()
        return exchanged(shares, [*self._around(event)], kept=kept, sums=reduces)

    def _foreign(self, event: Event) -> bool:
        """Whether a collective is of a group with ranks of other predictions."""
        return not {*event.ranks} <= {*self._ranks}

    def _made(self, event: Event) -> Held | None:
        given = happening.given(self._gathered, event)
        made = happening.made(self._gathered, event)
        if event.name not in POINT_TO_POINT:
            wrong = broken(event, given, made)
            if wrong:
                return Held(False, wrong)
        inside = bool(event.said("module")) or bool(made)
        if self._foreign(event) and inside and event.name not in POINT_TO_POINT:
            others = sorted({*event.ranks} - {*self._ranks})
            who = ", ".join(map(str, others))
            return Held(False, f"its group has rank {who}, of another prediction")
        if not self._alone:
            return None
        parts = [*self._around(event)]
        sums, kept = "reduce" in event.name, self._layouts.kept()
        held = exchanged(made, parts, kept=kept, sums=sums) if made else None
        if held is None or not held.right or not event.name.startswith("all_to_all"):
            return held
        part = next(one for one in parts if one.label == held.how)
        if part.what in ATTENTION and part.value.ndim == 4:
            tokens = self._layouts.tokens.get(part.value.shape[1], {})
            wrong = uneven_share(part, made, tokens)
            if wrong:
                return Held(False, f"{part.label}: {wrong}")
        return held


def _parent(name: str) -> str:
    return name.rpartition(".")[0]

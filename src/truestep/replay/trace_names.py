"""Which module of one trace answers to which of another: by name, and by what modules return.

An equal name is where to look first, and no proof: in official Wan `norm3` is what diffusers calls
`norm2`, and `norm2` what it calls `norm3`. Where two modules of one name return other things and
another pair of names returns the same, the names are exchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch

from truestep.errors import UsageError
from truestep.judge.divergence import ROOT, parent
from truestep.judge.growth import agreeing, gross
from truestep.keys import Key, address, key_of
from truestep.many import Texts
from truestep.pairing import Pairing, pair_activations
from truestep.pairing.content import fit, fit_any, is_constant
from truestep.pairing.rename import closed, numbered, renamed
from truestep.recording.columns import Table
from truestep.recording.readers import Source
from truestep.records import STATS
from truestep.replay.isolation import alike, matched_slots
from truestep.text import listed
from truestep.verdict import Rows

MOMENTS = 1e-3
"""Moments closer than this, over the rms, are of one tensor, if all of them are."""


@dataclass(frozen=True)
class Named:
    """Modules of an actual trace by the reference's names.

    Attributes:
        partners: Actual fqn to the reference's.
        notes: How they were paired, where not by name.
        others: Names on the two sides are other ones: what has no partner is left out.
    """

    partners: Mapping[str, str]
    notes: tuple[str, ...] = ()
    others: bool = False

    def name(self, tensor: str) -> str | None:
        """The reference's name of an actual tensor; None where its module has no partner."""
        key = key_of(tensor)
        fqn = key.fqn or ""
        if fqn in self.partners:
            if self.partners[fqn] == fqn and not key.written:
                return tensor
            return str(key.but(fqn=self.partners[fqn]))
        return None if self.others or fqn in self.partners.values() else tensor

    def alone_before(self, fqn: str, order: Sequence[str]) -> str:
        """What ran last before one of the reference's modules, and has no partner; else empty.

        Where nobody recorded inputs, nothing tells which of the two is wrong.

        Args:
            order: The reference's modules as they ran.
        """
        if fqn not in order:
            return ""
        before = [
            other
            for other in order[: order.index(fqn)]
            if other != ROOT and not other.startswith(f"{fqn}.") and not fqn.startswith(f"{other}.")
        ]
        return before[-1] if before and before[-1] not in {*self.partners.values()} else ""


def fqns(names: Iterable[str]) -> list[str]:
    """Modules of tensor names, in order, each once."""
    return list(dict.fromkeys(key_of(name).fqn or "" for name in names))


def name_modules(
    ours: Source,
    theirs: Source,
    names: tuple[Iterable[str], Iterable[str]],
    rename: Mapping[str, str] | None,
) -> Named:
    """Pair modules by a map, or by name, and those of other names by what they return.

    Args:
        ours, theirs: The two traces.
        names: Their tensors of modules.
        rename: Actual names to the reference's.

    Raises:
        UsageError: No module has a partner.
    """
    own, others = (fqns(side) for side in names)
    if rename is not None:
        made = {fqn: rename[fqn] if fqn in rename else renamed(fqn, rename) for fqn in own}
        partners = {fqn: new for fqn, new in made.items() if new is not None}
        return _told(partners | ({ROOT: ROOT} if ROOT in own else {}), own, others, ())
    common = [fqn for fqn in own if fqn in set(others)]
    partners = {fqn: fqn for fqn in common}
    open_ = [[fqn for fqn in side if fqn not in partners and fqn != ROOT] for side in (own, others)]
    if not all(open_):
        return Named(partners)
    sides = [
        {name: side.tensors[name] for name in side.tensors if address(name).fqn in set(free)}
        for side, free in zip((ours, theirs), open_, strict=True)
    ]
    pairing = pair_activations(Pairing(), *sides)
    found = pairing.rename()
    if not found and set(common) <= {ROOT}:
        raise UsageError(
            "no module of the actual trace has a partner in the reference",
            measured=f"actual: {listed(own)}; reference: {listed(others)}",
            likely="a trace of another model, or of another input",
            hint="name the pairs with --rename MAP.toml; traces at level sketch or full pair by "
            "what modules return",
        )
    if not found:
        return Named(partners)
    partners |= _by_layers(found, *open_)
    some = (
        "some modules have no namesake" if set(common) - {ROOT} else "no module has the same name"
    )
    return _told(
        partners,
        own,
        others,
        (f"{some} on both sides: {len(found)} are paired by what they return",),
    )


def _told(
    partners: Mapping[str, str], own: Sequence[str], others: Sequence[str], notes: tuple[str, ...]
) -> Named:
    alone = [fqn for fqn in own if fqn not in partners]
    lost = [fqn for fqn in others if fqn not in set(partners.values())]
    if alone:
        notes += (f"without a partner in the reference: {listed(alone)}",)
    if lost:
        notes += (f"without a partner in the actual trace: {listed(lost)}",)
    return Named(partners, notes, others=True)


def _by_layers(
    found: Mapping[str, str], own: Iterable[str], others: Iterable[str]
) -> dict[str, str]:
    """Pairs, the same in all layers that differ only in a number: in most of them, if not in all.

    A layer whose modules have exchanged their weights returns in one what others do in another; of
    as many layers that say one thing as another, the first that runs decides.
    """
    votes = Counter(_rule(a, r) for a, r in found.items())
    rules: dict[str, str] = {}
    for left, right in (rule for rule, _ in votes.most_common()):
        if "*" in left:
            rules.setdefault(left, right)
    made, known, taken = dict(found), set(others), Counter(found.values())
    for fqn in own:
        place = numbered(fqn)
        if place is None or place[0] not in rules:
            continue
        target = rules[place[0]].replace("*", place[1], 1)
        before, most = made.get(fqn), votes[place[0], rules[place[0]]]
        outvoted = before is not None and votes[_rule(fqn, before)] <= most
        if target in known and (outvoted or (before is None and not taken[target])):
            made[fqn] = target
            taken[target] += 1
    return made


def _rule(own: str, other: str) -> tuple[str, str]:
    """A pair in every layer: `blocks.*.q` and `blocks.*.to_q`; as it is where numbers differ."""
    left, right = numbered(own), numbered(other)
    return (left[0], right[0]) if left and right and left[1] == right[1] else (own, other)


class Names(Mapping[str, str]):
    """Names to names, in order and in little memory; of two that are equal the later one counts."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._new, self._old = Texts(), Texts()
        for new, old in pairs:
            self._new.append(new)
            self._old.append(old)
        if self._old.content == self._new.content and self._old.starts == self._new.starts:
            self._old = self._new
        if self._new.distinct < len(self._new):
            self.__init__({**self._pairs()}.items())  # type: ignore[misc]

    @classmethod
    def unchanged(cls, texts: Texts) -> Names:
        """Names to themselves."""
        names = cls(())
        names._new = names._old = texts
        return names

    def _pairs(self) -> dict[str, str]:
        return dict(zip(self._new, self._old, strict=True))

    def __getitem__(self, name: str) -> str:
        at = self._new.find(name)
        if at is None:
            raise KeyError(name)
        return self._old[at]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._new.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._new)

    def __len__(self) -> int:
        return len(self._new)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Both names of each; nothing is sought."""
        return zip(self._new, self._old, strict=True)


def match_inputs(names: Names, ours: Source, theirs: Source) -> Names:
    """Tensors by the reference's names, inputs that are called otherwise by their sizes.

    Args:
        names: The reference's name of a module, with a slot of the actual side's, to the actual
            side's own name: `module/blocks.0/0/cond/in.x`.
        ours, theirs: The two traces; their tables are read, not their tensors.
    """
    calls = _odd_calls(names, ours, theirs)
    if not calls:
        return names
    made = dict(names.pairs())
    for head, (own_slots, others) in calls.items():
        if all(slot in others and alike(tensor, others[slot]) for slot, tensor in own_slots):
            continue
        matches = matched_slots(own_slots, others)
        moved = {slot: made.pop(str(head.but(name=slot))) for slot, _ in own_slots}
        for (slot, _), match in zip(own_slots, matches, strict=True):
            free = slot not in matches  # as it is called, unless another one is
            name = match or (slot if free else f"{slot}.other")
            made[str(head.but(name=name))] = moved[slot]
    return Names(made.items())


_Slots = tuple[list[tuple[str, torch.Tensor]], dict[str, torch.Tensor]]


def _odd_calls(names: Names, ours: Source, theirs: Source) -> dict[Key, _Slots]:
    """Inputs on both sides of the calls of which one is not to be found, with its sizes, by name.

    There may be a million calls: all others are not kept.
    """
    own, others = table_of(ours), table_of(theirs)
    calls: dict[Key, _Slots] = {}
    for new, old in names.pairs():
        key = key_of(new)
        if not key.inward:
            continue
        shape = others.value(new, "shape")
        if shape is None or not alike(_empty(own.value(old, "shape")), _empty(shape)):
            calls.setdefault(key.but(name=""), ([], {}))
    if not calls:
        return calls
    for new, old in names.pairs():
        key = key_of(new)
        found = key.inward and (head := key.but(name="")) in calls
        if (
            found and str(head.but(name=key.name)) == new
        ):  # a damaged name may be read as another one
            calls[head][0].append((key.name, _empty(own.value(old, "shape"))))
    for name, shape in others.each("name", "shape"):
        key = key_of(name)
        if key.inward and (head := key.but(name="")) in calls:
            calls[head][1][key.name] = _empty(shape)
    return calls


def table_of(side: Source) -> Table:
    """The table of a trace, which may have a million rows."""
    return Table.of(side.manifest.tensors if side.manifest else ())


@lru_cache(maxsize=4096)
def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these sizes, without content."""
    return torch.empty(shape, device="meta")


# --- exchanged names ---------------------------------------------------------------------------


@dataclass
class _Siblings:
    """Modules of one parent whose namesakes return other things, or that have none."""

    own: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def exchange(
    named: Named,
    rows: Rows,
    ours: Source,
    theirs: Source,
    names: tuple[Iterable[str], Iterable[str]],
) -> Named | None:
    """Exchange names within a parent where that is what the outputs say.

    That is taken for a matter of names where the parent returns the same on both sides, or the
    modules run in the order that the outputs say and not in that of their names; or in a layer that
    differs from such a one only in its number. Else two modules have exchanged what they hold.

    Args:
        named: Pairs so far, under which `rows` were made.
        rows: Of both traces, judged, in the reference's order.
        ours, theirs: The two traces.
        names: Their tensors of modules, in order of execution.

    Returns:
        The new pairs; None where nothing is to be exchanged.
    """
    apart = zip(rows.each("fqn", "name"), gross(rows), strict=True)
    wrong = {fqn for (fqn, name), other in apart if other and "/out." in name}
    ended = [fqns(name for name in side if "/out." in name) for side in names]
    ran = [{fqn: at for at, fqn in enumerate(side)} for side in ended]
    agree, same = agreeing(rows), _comparer(ours, theirs, names)
    sizes = [_elements(side) for side in (ours, theirs)]
    partners, moved = dict(named.partners), dict[str, str]()
    while sure := _exchanged(partners, wrong, agree, same, ran, sizes):
        taken = {*sure, *moved}, {*sure.values(), *moved.values()}
        partners = {a: r for a, r in partners.items() if a not in taken[0] and r not in taken[1]}
        moved |= sure
        partners |= moved
        wrong -= set(sure.values())
    if not moved:
        return None
    told = listed([f"{a} = {r}" for a, r in moved.items()])
    note = f"paired by what they return, not by name: {told}"
    return Named(partners, (*named.notes, note), others=named.others)


def _exchanged(
    partners: Mapping[str, str],
    wrong: set[str | None],
    agree: Mapping[str, bool],
    same: Callable[[str, str], bool],
    ran: Sequence[Mapping[str, int]],
    sizes: Sequence[Mapping[str, int]],
) -> dict[str, str]:
    """Pairs that outputs make of modules without a partner, or with one that returns another."""
    groups = _siblings(partners, wrong, ran)
    sure: dict[str, str] = {}
    for (_, around), group in groups.items():
        links = closed(_links(group, same), group.own, group.others)
        names_only = agree.get(around, False) or _in_order(links, *ran)
        paired = set(partners.values())
        sure |= {
            a: r
            for a, r in links.items()
            if names_only or (a not in partners and r not in paired and a not in ran[1])
        }
    own = [fqn for group in groups.values() for fqn in group.own]
    others = [fqn for group in groups.values() for fqn in group.others]
    made = {a: r for a, r in _by_layers(sure, own, others).items() if partners.get(a) != r}
    return made or _left_over(partners, groups.values(), ran, sizes)


def _left_over(
    partners: Mapping[str, str],
    groups: Iterable[_Siblings],
    ran: Sequence[Mapping[str, int]],
    sizes: Sequence[Mapping[str, int]],
) -> dict[str, str]:
    """Modules without a namesake that nothing else pairs: as many of the same sizes in order."""
    taken = set(partners.values())
    made: dict[str, str] = {}
    for group in groups:
        own = [fqn for fqn in group.own if fqn not in partners and fqn not in ran[1]]
        others = [fqn for fqn in group.others if fqn not in taken and fqn not in ran[0]]
        for size in dict.fromkeys(sizes[0].get(fqn) for fqn in own):
            pair = [
                [fqn for fqn in side if of.get(fqn) == size]
                for side, of in zip((own, others), sizes, strict=True)
            ]
            if len(pair[0]) == len(pair[1]):
                made |= dict(zip(*pair, strict=True))
    return made


def _elements(side: Source) -> dict[str, int]:
    """How many elements every module returns first."""
    found: dict[str, int] = {}
    for name, shape in table_of(side).each("name", "shape"):
        if "/out." in name:
            found.setdefault(key_of(name).fqn or ROOT, math.prod(shape))
    return found


def _siblings(
    partners: Mapping[str, str], wrong: set[str | None], ran: Sequence[Iterable[str]]
) -> dict[tuple[str, str], _Siblings]:
    """Open modules by their parents on both sides; groups in which nothing can be exchanged go."""
    groups: dict[tuple[str, str], _Siblings] = {}
    back = {r: a for a, r in partners.items()}
    for fqn in ran[0]:
        around = partners.get(parent(fqn))
        target = partners.get(fqn)
        if fqn != ROOT and around is not None and (target is None or target in wrong):
            groups.setdefault((parent(fqn), around), _Siblings()).own.append(fqn)
    for fqn in ran[1]:
        home = back.get(parent(fqn))
        if fqn != ROOT and home is not None and (fqn not in back or fqn in wrong):
            groups.setdefault((home, parent(fqn)), _Siblings()).others.append(fqn)
    return {key: group for key, group in groups.items() if group.own and group.others}


def _links(group: _Siblings, same: Callable[[str, str], bool]) -> dict[str, str]:
    """Pairs of one parent's modules that return the same as each other, and as no third."""
    hits = {a: [r for r in group.others if same(a, r)] for a in group.own}
    wanted = Counter(r for found in hits.values() for r in found)
    return {a: found[0] for a, found in hits.items() if len(found) == 1 and wanted[found[0]] == 1}


def _in_order(links: Mapping[str, str], own: Mapping[str, int], others: Mapping[str, int]) -> bool:
    """Whether modules run in the order of their links, and not in that of their names."""
    order = sorted(links, key=own.__getitem__)
    linked = [others[links[a]] for a in order]
    by_name = [others[a] for a in order if a in others]
    return linked == sorted(linked) and by_name != sorted(by_name)


def _comparer(
    ours: Source, theirs: Source, names: tuple[Iterable[str], Iterable[str]]
) -> Callable[[str, str], bool]:
    """Whether two modules return the same, as far as is seen where both run first."""
    outputs = [_outputs(side) for side in names]
    levels = {side.manifest.level for side in (ours, theirs) if side.manifest}
    level = levels.pop()
    prefix = {"full": "", "sketch": "sketch/", "stats": "stats/"}[level]

    def same(own: str, other: str) -> bool:
        mine, others = outputs[0](own), outputs[1](other)
        place = next((key for key in mine if key in others), None)
        if place is None or levels:  # of two levels nothing is kept in one form
            return False
        a = ours.tensors[f"{prefix}{mine[place]}"]
        r = theirs.tensors[f"{prefix}{others[place]}"]
        if level == "stats":
            return _same_moments(a, r)
        if a.numel() != r.numel() or not a.is_floating_point() or not r.is_floating_point():
            return False
        if is_constant(a) or is_constant(r):
            return False
        found = fit(a, r) if level == "sketch" else fit_any(a, r)
        return found is not None and found.scale == 1.0

    return same


def _outputs(names: Iterable[str]) -> Callable[[str], Mapping[Key, str]]:
    """Outputs of a module by step, branch and slot, which are sought when they are asked for."""

    @cache
    def by_module() -> dict[str, Texts]:
        found: dict[str, Texts] = {}
        for name in names:
            key = key_of(name)
            if key.outward and not key.call:
                found.setdefault(key.label, Texts()).append(name)
        return found

    @lru_cache(maxsize=64)
    def outputs(module: str) -> dict[Key, str]:
        return {key_of(name).but(fqn=None): name for name in by_module().get(module, ())}

    return outputs


def _same_moments(a: torch.Tensor, r: torch.Tensor) -> bool:
    """Whether every moment agrees, of tensors that are not constant."""
    own, other = (dict(zip(STATS, side.tolist(), strict=True)) for side in (a, r))
    if own["count"] != other["count"] or own["nonfinite"] or other["nonfinite"]:
        return False
    limit = MOMENTS * other["rms"]
    return other["std"] > limit and all(abs(own[key] - other[key]) <= limit for key in STATS[2:])

"""Which module of a trusted model a candidate's module answers to, whole or in parts."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from truestep.errors import UsageError
from truestep.measure.distance import distance, same_bits
from truestep.pairing.naming import ROOT, callable_module, named_modules, unwrapped
from truestep.pairing.records import Pairing
from truestep.pairing.rename import closed, numbered, renamed
from truestep.pairing.state import parent as holder
from truestep.text import listed

ROUNDED = 0.02
"""Weights that are closer than this are the same in two dtypes: bfloat16 is 1.7e-3 away."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Names = Callable[[str], "tuple[Part, ...]"]
"""A module's fqn to the parts of its output that are compared, and under which names."""


@dataclass(frozen=True)
class Part:
    """A module's output, or some channels of its last axis.

    Attributes:
        fqn: Name under which it is compared: the trusted module's, `blocks.0.attn1.to_k`; of a
            part of a fused trusted module with its place, `blocks.0.attn.qkv[64:128]`.
        rows: The channels, in order; None is the whole.
    """

    fqn: str
    rows: tuple[int, ...] | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of an output `... c`; the whole of one that has fewer channels."""
        if self.rows is None or not tensor.ndim or tensor.shape[-1] <= max(self.rows):
            return tensor
        return tensor[..., list(self.rows)]


def namesake(fqn: str) -> tuple[Part, ...]:
    """A module answers to the one of its own name."""
    return (Part(fqn),)


@dataclass(frozen=True)
class Partners:
    """How the modules of two implementations answer to each other.

    Attributes:
        own: Candidate's fqn to the parts that it answers to: one, or several where it is fused.
        cut: Trusted fqn of a fused module to its parts, where the candidate has them apart.
        unmatched: Trusted modules that nothing answers to.
        paired: Number of trusted modules that have a partner.
    """

    own: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    cut: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    paired: int = 0

    def candidate(self, fqn: str) -> tuple[Part, ...]:
        """Parts that a candidate's module answers to; none without a partner."""
        return self.own.get(fqn, ())

    def trusted(self, fqn: str) -> tuple[Part, ...]:
        """Parts of a trusted module's output under the names that they are compared by."""
        return self.cut.get(fqn, (Part(fqn),))

    def note(self) -> str:
        """How many modules were paired, and which of the trusted ones have no partner."""
        total = self.paired + len(self.unmatched)
        text = f"paired {self.paired} of {total} modules of the trusted model"
        if not self.unmatched:
            return text
        shown = listed(self.unmatched, 4)
        return f"{text}; without a partner, judged with what is around them: {shown}"


def partners_of(
    candidate: torch.nn.Module,
    trusted: torch.nn.Module,
    *,
    rename: Mapping[str, str] | None = None,
) -> Partners | None:
    """Pair two models' modules; None where every trusted module has a namesake that it means.

    Args:
        candidate, trusted: The two sides.
        rename: Candidate's names to trusted ones, `*` for one part of a name; goes before what
            the weights say.

    Raises:
        UsageError: A rule of the map cannot mean anything.
    """
    ours, theirs = ([*named_modules(side).modules] for side in (candidate, trusted))
    if not rename and set(theirs) <= set(ours):
        return _by_name(ours, theirs, exchanged(candidate, trusted))
    return partners_by_weights(candidate, trusted, rename=rename)


def partners_by_weights(
    candidate: torch.nn.Module,
    trusted: torch.nn.Module,
    *,
    rename: Mapping[str, str] | None = None,
) -> Partners:
    """Pair two models' modules by what they hold, whatever they are called; see `partners_of`."""
    from truestep.pairing.solve import pair_modules

    ours, theirs = ([*named_modules(side).modules] for side in (candidate, trusted))
    pairing = pair_modules(candidate, trusted, rename=rename)
    callables = [
        name
        for name, module in named_modules(trusted).modules.items()
        if name != ROOT and callable_module(module)
    ]
    sizes = {
        name: len(tensor)
        for side in (candidate, trusted)
        for name, tensor in side.state_dict().items()
        if tensor.ndim
    }
    return _completed(pairing, ours, theirs, callables, rename or {}, sizes)


def exchanged(candidate: torch.nn.Module, trusted: torch.nn.Module) -> dict[str, str]:
    """Modules whose namesakes are other ones, as official Wan's `norm3` is diffusers' `norm2`.

    That is so where other code is around them, and where the weights, or their shapes, say so in
    most layers: in one layer, or under the same code, two modules have exchanged their weights.

    Returns:
        Candidate's names to trusted ones.
    """
    ours, theirs = (dict(named_modules(side).modules) for side in (candidate, trusted))
    links: dict[str, str] = {}
    for around, parts in _children(theirs).items():
        if around not in ours or _code(ours[around]) is _code(theirs[around]):
            continue
        other = [n for n in parts if n in ours and not _same_weights(ours[n], theirs[n])]
        hits = {
            a: [r for r in other if r != a and _same_weights(ours[a], theirs[r])]
            for a in other
            if ours[a].state_dict()
        }
        wanted = Counter(r for found in hits.values() for r in found)
        sure = {a: r[0] for a, r in hits.items() if len(r) == 1 and wanted[r[0]] == 1}
        links |= closed(sure, other, other)
    made: dict[str, str] = {}
    for rule, target in dict.fromkeys((_layer(a), _layer(r)) for a, r in links.items()):
        pairs = {n: _filled(target, n) for n in ours if _layer(n) == rule}
        pairs = {a: r for a, r in pairs.items() if a in theirs and r in theirs}
        said = [
            links.get(a) == r or _shapes(ours[a]) == _shapes(theirs[r]) != _shapes(theirs[a])
            for a, r in pairs.items()
        ]
        if 2 * sum(said) > len(said):
            made |= pairs
    return made


def _children(modules: Mapping[str, torch.nn.Module]) -> dict[str, list[str]]:
    """Modules by the one that holds them."""
    found: dict[str, list[str]] = {}
    for name in modules:
        if name != ROOT:
            found.setdefault(holder(name) or ROOT, []).append(name)
    return found


def _code(module: torch.nn.Module) -> type:
    return type(unwrapped(module))


def _layer(name: str) -> str:
    place = numbered(name)
    return place[0] if place else name


def _filled(rule: str, like: str) -> str:
    """A rule's name in the layer of another name."""
    place = numbered(like)
    return rule.replace("*", place[1], 1) if place else rule


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in module.state_dict().items() if isinstance(t, torch.Tensor)}


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a module holds."""
    return {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}


def _same_weights(own: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules hold the same parameters, up to the rounding of a dtype."""
    if _shapes(own) != _shapes(other):
        return False
    theirs = _tensors(other)
    return all(_same_tensor(tensor, theirs[name]) for name, tensor in _tensors(own).items())


def _same_tensor(own: torch.Tensor, other: torch.Tensor) -> bool:
    if own.is_meta or other.is_meta:
        return True  # nothing is known of it
    if own.dtype == other.dtype and same_bits(own, other):
        return True
    return bool(own.numel()) and distance(own, other).rel_l2 < ROUNDED


def _by_name(
    ours: Iterable[str], theirs: Iterable[str], moved: Mapping[str, str]
) -> Partners | None:
    """Every module with its namesake, but for those that mean others, and what is in them."""
    if not moved:
        return None
    known = set(theirs)
    own: dict[str, tuple[Part, ...]] = {}
    for name in ours:
        target = renamed(name, moved) or name
        if name != ROOT and target in known:
            own[name] = (Part(target),)
    met = {part.fqn for parts in own.values() for part in parts}
    unmatched = tuple(name for name in theirs if name != ROOT and name not in met)
    return Partners(own, {}, unmatched, len(met))


def _completed(
    pairing: Pairing,
    ours: Iterable[str],
    theirs: Iterable[str],
    callables: Iterable[str],
    rename: Mapping[str, str],
    sizes: Mapping[str, int],
) -> Partners:
    """The solver's pairs, made consistent, with the map's own on top."""
    known = set(theirs)
    ours = list(ours)
    names = _consistent({a: r for a, r in pairing.rename().items() if a and r}, known)
    names |= _containers(names, ours, known)
    own: dict[str, tuple[Part, ...]] = {a: (Part(r),) for a, r in names.items()}
    for whole, parts in _fused(pairing, names, known, sizes).items():
        own[whole] = tuple(Part(name, place.rows) for name, place in parts.items())
    cut: dict[str, tuple[Part, ...]] = {}
    back = {r: a for a, r in names.items()}
    for whole, parts in _fused(pairing, back, set(ours), sizes, swapped=True).items():
        made = {name: Part(f"{whole}[{place.text}]", place.rows) for name, place in parts.items()}
        cut[whole] = tuple(made.values())
        own.update({name: (Part(part.fqn),) for name, part in made.items()})
    for name in ours:
        target = renamed(name, rename)
        if name == ROOT or target is None or target not in known:
            continue
        taken = {target, *(part.fqn for part in cut.pop(target, ()))}
        for other, answers in [*own.items()]:
            own[other] = tuple(part for part in answers if part.fqn not in taken)
        own[name] = (Part(target),)
    met = {part.fqn.partition("[")[0] for answers in own.values() for part in answers}
    listed = list(callables)
    unmatched = tuple(name for name in listed if name not in met)
    return Partners(own, cut, unmatched, len(listed) - len(unmatched))


def _consistent(names: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """Pairs in which what is inside a module answers to what is inside of its partner.

    Weights that two layers have exchanged lead the content astray, not the structure around it.
    """
    made: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.count(".")):
        made[name] = _inside(names[name], made.get(holder(name)), known)
    return made


def _containers(names: Mapping[str, str], ours: Iterable[str], known: set[str]) -> dict[str, str]:
    """Partners of modules some of whose parameters have none: what holds the same pairs inside."""
    made: dict[str, str] = {}
    taken = set(names.values())
    for module in sorted(ours, key=lambda name: -name.count(".")):
        inner = {a: r for a, r in names.items() if a.startswith(f"{module}.")}
        if module in names or len(inner) < 2:
            continue
        parts = zip(*(r.split(".") for r in inner.values()), strict=False)
        common = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
        other = ".".join(common)
        inside = {a for a, r in names.items() if r.startswith(f"{other}.")}
        if other in known - taken and inside == set(inner):
            made[module] = other
            taken.add(other)
    return made


def _inside(name: str, around: str | None, known: set[str]) -> str:
    """The namesake of a module inside of another where it is not in there, if there is one."""
    if around is None or not around or name.startswith(f"{around}."):
        return name
    moved = ".".join([around, *name.split(".")[around.count(".") + 1 :]])
    return moved if moved in known else name


@dataclass(frozen=True)
class _Place:
    """Rows of a fused parameter, as the solver writes them."""

    text: str
    rows: tuple[int, ...]


def _fused(
    pairing: Pairing,
    names: Mapping[str, str],
    known: set[str],
    sizes: Mapping[str, int],
    *,
    swapped: bool = False,
) -> dict[str, dict[str, _Place]]:
    """Fused modules, with the modules of the other side that are parts of them and where.

    Rows of the weight and of the bias are channels of the output. Layers that differ only in a
    number are fused alike: a place that most of them (or else the simplest) have holds for all.

    Args:
        names: Fused side's modules to those of the other side.
        known: Modules of the other side.
        sizes: Rows of every parameter.
        swapped: The trusted side is the fused one.
    """
    votes: dict[str, dict[str, Counter[tuple[str, int]]]] = {}
    modules: dict[str, str] = {}
    for pair in pairing.of("parameter"):
        whole, parts = (pair.reference, pair.actual) if swapped else (pair.actual, pair.reference)
        if len(whole) != 1 or len(parts) < 2 or len(parts) != len(pair.parts):
            continue
        module, around = holder(whole[0]), names.get(holder(holder(whole[0])))
        if around is None:
            continue
        modules[module] = around
        table = votes.setdefault(_NUMBER.sub("*", module), {})
        for name, place in zip(parts, pair.parts, strict=True):
            inner = _inside(holder(name), around, known).removeprefix(f"{around}.")
            table.setdefault(inner, Counter())[place, sizes.get(name, 0)] += 1
    found: dict[str, dict[str, _Place]] = {}
    for module, around in modules.items():
        table = votes[_NUMBER.sub("*", module)]
        places = {f"{around}.{inner}": _elected(counts) for inner, counts in table.items()}
        kept = {name: place for name, place in places.items() if place is not None}
        if len(kept) == len(places) and set(kept) <= known:
            found[module] = kept
    return found


def _elected(votes: Counter[tuple[str, int]]) -> _Place | None:
    """The place that most say; of several, the simplest; None if it cannot be read."""
    most = max(votes.values())
    text, count = min((p for p, n in votes.items() if n == most), key=lambda p: len(p[0]))
    if plain := re.fullmatch(r"(\d+):(\d+)", text):
        return _Place(text, tuple(range(int(plain[1]), int(plain[2]))))
    if heads := re.fullmatch(r"(\d+) of every (\d+) from (\d+)", text):
        block, period, start = map(int, heads.groups())
        rows = tuple(start + i // block * period + i % block for i in range(count))
        return _Place(text, rows)
    return None


def check_rename(
    rename: Mapping[str, str], *, candidate: Iterable[object], trusted: Iterable[object]
) -> None:
    """Refuse a map that names what neither side has.

    Args:
        rename: Candidate's names to trusted ones, of modules or parameters.
        candidate, trusted: The models of either side; what is no torch module is passed by.

    Raises:
        UsageError: A rule matches nothing of the candidate, or leads to nothing in the trusted
            models; with the closest names.
    """
    ours, theirs = _names(candidate), set(_names(trusted))
    for rule, target in rename.items():
        made = {renamed(name, {rule: target}) for name in ours} - {None}
        if not made:
            raise UsageError(
                f"the rename rule {rule!r} = {target!r} matches no module of the candidate",
                measured=f"the closest: {', '.join(_closest(rule, ours))}",
                hint="names are the candidate's on the left, the trusted model's on the right",
            )
        if not made & theirs:
            raise UsageError(
                f"the rename rule {rule!r} = {target!r} leads to no module of the trusted model",
                measured=f"the closest: {', '.join(_closest(target, theirs))}",
                hint="names are the candidate's on the left, the trusted model's on the right",
            )


def _names(models: Iterable[object]) -> list[str]:
    """Names of all modules and parameters of models."""
    found: list[str] = []
    for model in models:
        if isinstance(model, torch.nn.Module):
            found += [name for name in named_modules(model).modules if name != ROOT]
            found += [name for name, _ in model.named_parameters()]
    return found


def _closest(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.0)

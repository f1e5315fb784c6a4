"""State dicts of both sides beside each other, and a skeleton of the conversion between them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.errors import UsageError
from truestep.files import write_text

if TYPE_CHECKING:
    import torch

    from truestep.pairing.records import Pair as Solved

    State = Mapping[str, torch.Tensor]

_MOST = 4
"""Parts of a fused parameter whose orders are all tried."""


@dataclass(frozen=True)
class Pair:
    """One line of the listing.

    Attributes:
        official, port: Names; several where a parameter was split or fused, none where unmatched.
        how: How the port's value is made of the official one: `same`, `permute(2, 1, 0)`.
        evidence: Why they are paired.
    """

    official: tuple[str, ...] = ()
    port: tuple[str, ...] = ()
    how: str = ""
    evidence: str = ""


def dump(path: Path, state: State) -> None:
    """Write names, dtypes and shapes of a state dict, one line each."""
    write_text(path, "\n".join(key_lines(state)) or "(no parameters)", "the key dump")


def key_lines(state: State) -> list[str]:
    """`name  dtype  [shape]` of every tensor, aligned."""
    width = max((len(name) for name in state), default=0)
    return [f"{name:<{width}}  {_what(tensor)}" for name, tensor in state.items()]


def _what(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def pair_keys(port: State, official: State) -> list[Pair]:
    """Pair parameters by name, by values (also transposed), by the end of the name, by near values.

    A pair is made only where it is the only one. What is left is listed one-sided.

    Returns:
        Pairs in the official side's order, then what only the port has.
    """
    found: dict[str, Pair] = {}
    taken: set[str] = set()
    for name, tensor in official.items():
        if name in port and port[name].shape == tensor.shape:
            found[name] = Pair((name,), (name,), "same", "same name and shape")
            taken.add(name)
    for pair in _by_value(port, official, set(found), taken):
        found[pair.official[0]] = pair
        taken.update(pair.port)
    for find in (_by_suffix, _by_near_values):
        for pair in list(find(port, official, set(found), taken)):
            found[pair.official[0]] = pair
            taken.update(pair.port)
    counters = [name for name in official if _is_counter(name)]
    ours = [name for name in port if _is_counter(name) and name not in taken]
    for theirs, own in zip(counters, ours, strict=False):
        found.setdefault(theirs, Pair((theirs,), (own,), "same", "counts training batches"))
    taken.update(ours[: len(counters)])
    fused = _fused(port, official, set(found), taken)
    for pair in [p for p in fused if len(p.official) == len(p.port) == 1 and p.how[:5] != "chunk"]:
        found[pair.official[0]] = pair
        taken.update(pair.port)
        fused.remove(pair)
    covered = {name for pair in fused for name in pair.official}
    taken.update(name for pair in fused for name in pair.port)
    rows = [found.get(name) or Pair(official=(name,)) for name in official if name not in covered]
    return rows + fused + [Pair(port=(name,)) for name in port if name not in taken]


def _fused(port: State, official: State, paired: set[str], taken: set[str]) -> list[Pair]:
    """Parameters whose places decide, or that one side has in one piece and the other in several.

    The solver sees both sides whole; names mean the same on both only where they are paired.
    """
    ours = {k: v for k, v in port.items() if v.is_floating_point()}
    theirs = {k: v for k, v in official.items() if v.is_floating_point()}
    return _solved(ours, theirs, known=(taken, paired))


def _solved(port: State, official: State, *, known: tuple[set[str], set[str]]) -> list[Pair]:
    """Pairs of what is left over, each with an expression that was tried and reproduces the port.

    Args:
        port, official: All parameters: the pairs that are known tell where the others belong.
        known: Names that have a pair, of the port and of the official side.
    """
    from truestep.pairing.solve import pair_modules

    ours, theirs = known
    if ours >= set(port) or theirs >= set(official):
        return []
    try:
        pairing = pair_modules(port, official)
    except UsageError:
        return []
    return [
        pair
        for found in pairing.of("parameter")
        if not (ours & set(found.actual) or theirs & set(found.reference))
        for pair in _expressed(found, port, official)
    ]


def _expressed(found: Solved, port: State, official: State) -> Iterator[Pair]:
    if len(found.actual) == len(found.reference) == 1:
        how = relation(port[found.actual[0]], official[found.reference[0]])
        if how:
            yield Pair(found.reference, found.actual, how, found.text())
    elif len(found.actual) == 1 and 1 < len(found.reference) <= _MOST:
        target = port[found.actual[0]]
        for order in permutations(found.reference):
            if _same_cat([official[name] for name in order], target):
                yield Pair(order, found.actual, "cat", found.text())
                return
    elif len(found.reference) == 1 and len(found.actual) > 1:
        import torch

        source, count = official[found.reference[0]], len(found.actual)
        for name in found.actual:
            for index, part in enumerate(source.chunk(count)):
                if part.shape == port[name].shape and torch.equal(part, port[name]):
                    how = f"chunk({count})[{index}]"
                    yield Pair(found.reference, (name,), how, found.text())
                    break


def _same_cat(parts: list[torch.Tensor], target: torch.Tensor) -> bool:
    import torch

    if any(part.shape[1:] != target.shape[1:] for part in parts if part.ndim):
        return False
    joined = torch.cat(parts)
    return joined.shape == target.shape and torch.equal(joined, target)


def _by_suffix(port: State, official: State, paired: set[str], taken: set[str]) -> Iterable[Pair]:
    """Pairs of equal shape whose names differ in a prefix only."""
    for name, tensor in official.items():
        if name in paired or _is_counter(name):
            continue
        free = [o for o in port if o not in taken and port[o].shape == tensor.shape]
        fits = [
            other
            for other in free
            if _tail(name, other) == min(name.count("."), other.count(".")) + 1 > 1
        ]
        if not fits and "." in name:
            fits = [o for o in free if o.partition(".")[2] == name.partition(".")[2]]
        if len(fits) == 1:
            yield Pair((name,), (fits[0],), "same", "same name but for a prefix, same shape")


def _tail(one: str, other: str) -> int:
    """Number of dotted parts that two names have in common at their ends."""
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _by_near_values(
    port: State, official: State, paired: set[str], taken: set[str]
) -> Iterable[Pair]:
    """Pairs of matrices within a tenth of each other, also transposed: rounded or quantised."""
    left = {k: v for k, v in official.items() if k not in paired and v.ndim == 2}
    for name, tensor in port.items():
        if name in taken or tensor.ndim != 2 or not tensor.is_floating_point():
            continue
        fits = []
        for other, source in left.items():
            for how, moved in (("same", source), ("permute(1, 0)", source.T)):
                if moved.shape == tensor.shape and _near(tensor, moved):
                    fits.append((other, how))
        if len(fits) == 1:
            yield Pair((fits[0][0],), (name,), fits[0][1], "the only matrix within a tenth of it")


def _near(actual: torch.Tensor, reference: torch.Tensor) -> bool:
    rows = slice(0, 64)
    one, other = actual[rows].float(), reference[rows].float()
    return bool((one - other).norm() <= 0.1 * other.norm()) and bool(
        (actual.float() - reference.float()).norm() <= 0.1 * reference.float().norm()
    )


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _by_value(port: State, official: State, paired: set[str], taken: set[str]) -> Iterable[Pair]:
    """Pairs whose sorted values agree bit for bit, where no other parameter has the same."""
    unpaired = {k: v for k, v in official.items() if k not in paired}
    free = {k: v for k, v in port.items() if k not in taken}
    their_ranges, our_ranges = _ranges(unpaired), _ranges(free)
    both = set(their_ranges.values()) & set(our_ranges.values())  # only these need to be sorted
    theirs = _fingerprints({k: unpaired[k] for k, found in their_ranges.items() if found in both})
    ours = _fingerprints({k: free[k] for k, found in our_ranges.items() if found in both})
    for key, names in theirs.items():
        others = ours.get(key, [])
        if len(names) != 1 or len(others) != 1:
            continue
        how = relation(port[others[0]], official[names[0]])
        if how:
            yield Pair((names[0],), (others[0],), how, "the only parameters with these values")


def _ranges(state: State) -> dict[str, tuple[int, float, float]]:
    """Size, smallest and largest of each parameter whose values say where it belongs: zeros and
    ones do not."""
    import torch

    found = {}
    for name, tensor in state.items():
        if tensor.numel() < 2 or not tensor.is_floating_point():
            continue
        low, high = (float(value) for value in tensor.detach().to(torch.float64).aminmax())
        if low != high:
            found[name] = (tensor.numel(), low, high)
    return found


def _fingerprints(state: State) -> dict[bytes, list[str]]:
    """Names by the digest of their sorted values."""
    import hashlib

    import numpy as np
    import torch

    found: dict[bytes, list[str]] = {}
    for name, tensor in state.items():
        values = tensor.detach().to(torch.float64).reshape(-1).view(torch.int64)
        digest = hashlib.sha256(np.sort(values.cpu().numpy()).tobytes()).digest()
        found.setdefault(digest, []).append(name)
    return found


def relation(actual: torch.Tensor, reference: torch.Tensor) -> str:
    """How `actual` is made of `reference`: `same`, `permute(...)`, with a reshape; else empty."""
    from itertools import permutations

    import torch

    target = actual.detach().to(torch.float64)
    source = reference.detach().to(torch.float64)
    if target.numel() != source.numel() or source.ndim > 5:
        return ""
    tries = sorted(permutations(range(source.ndim)), key=lambda p: p != tuple(range(source.ndim)))
    for order in tries:
        moved = source.permute(order)
        text = "same" if order == tuple(range(source.ndim)) else f"permute{order}"
        if moved.shape != target.shape:
            moved = moved.reshape(target.shape)
            text = f"{'' if text == 'same' else text + '.'}reshape{tuple(target.shape)}"
        if torch.equal(moved, target):
            return text
    return ""


def side_by_side(pairs: Iterable[Pair], port: State, official: State) -> list[tuple[str, ...]]:
    """Rows of the listing: official name and shape, port name and shape, how and why."""

    def shapes(names: tuple[str, ...], state: State) -> str:
        return ", ".join(_what(state[name]) for name in names)

    return [
        (
            ", ".join(pair.official) or "-",
            shapes(pair.official, official),
            ", ".join(pair.port) or "-",
            shapes(pair.port, port),
            pair.how or "unmatched",
            pair.evidence,
        )
        for pair in pairs
    ]


_SKELETON = '''"""Convert the official weights into the port's: one line a parameter.

{summary}
"""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]


def convert(official: State) -> State:
    """The port's state dict of the official one.

    Raises:
        KeyError: A parameter is missing, unexpected, or has no rule yet.
    """
    unknown = sorted(set(official) - KNOWN)
    if unknown:
        raise KeyError(f"the official weights hold parameters without a rule: {{unknown}}")
    port: State = {{}}
{lines}
    return port


def no_rule(name: str) -> torch.Tensor:
    """Raise: nobody has said yet what this parameter is made of."""
    raise KeyError(f"no rule makes the port's {{name}}")


KNOWN = frozenset(
    [
{known}
    ]
)
'''


def skeleton(pairs: Iterable[Pair], port: State, official: State) -> str:
    """A Python file that converts a state dict; a parameter without a rule raises in it."""
    lines, known, unmatched = [], [], []
    for pair in pairs:
        names = [f"official[{json.dumps(name)}]" for name in pair.official]
        if pair.port and len(names) == 1 and pair.how:
            how = "" if pair.how == "same" else f".{pair.how}"
            lines += [f"    port[{json.dumps(pair.port[0])}] = {names[0]}{how}"]
        elif pair.port and pair.how:
            lines += [f"    port[{json.dumps(pair.port[0])}] = torch.cat([{', '.join(names)}])"]
        elif pair.port:
            shape = list(port[pair.port[0]].shape)
            target = json.dumps(pair.port[0])
            lines.append(f"    port[{target}] = no_rule({target})  # {shape}")
        else:
            shape = list(official[pair.official[0]].shape)
            unmatched.append(f"    # no rule uses {names[0]}  {shape}")
            continue
        known += [f"        {json.dumps(name)}," for name in pair.official]
    made = len(lines) - sum("no_rule(" in line for line in lines)
    summary = (
        f"{made} of {len(port)} parameters of the port have a rule; {len(unmatched)} official\n"
        "parameters are in none, so that converting raises until each is dealt with."
    )
    return _SKELETON.format(
        summary=summary, lines="\n".join(lines + unmatched), known="\n".join(known)
    )

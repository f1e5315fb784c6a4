"""What content leaves open, decided by the places of what is paired: only where one way is left.

Everything is read off the pairs found so far: which module of one side is which of the other, and
which names a repeated layer gives its parameters. A pair whose content differs is marked odd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import NamedTuple

from truestep.pairing.fused import Place
from truestep.pairing.records import Ambiguous, Evidence
from truestep.pairing.state import (
    AGREEMENT,
    Match,
    State,
    Unit,
    ancestors,
    inside,
    relative,
    scopes,
)

FEW = 0.25
"""Equal names overrule content for at most this share of the pairs: of more, the names lie."""


class Habit(NamedTuple):
    """What a repeated layer calls one of its parameters on both sides.

    Attributes:
        containers: The lists of layers (`layers`, `blocks`).
        actual, reference: Names inside a layer, and where in the tensor, in words.
    """

    containers: tuple[str, str]
    actual: tuple[str, Place | None]
    reference: tuple[str, Place | None]


def settle(state: State) -> None:
    """Pair what has one place left, right what contradicts its kind, and mark what is odd."""
    _until_done(state, content=True)
    _by_names_against_content(state)
    _by_habit_against_content(state)
    _until_done(state, content=False)
    _leftover_names(state)
    _until_done(state, content=False)
    _last_one(state)
    _mark(state)


def by_neighbours(state: State) -> None:
    """Pair what lies beside what is paired and holds the same numbers."""
    _until_done(state, content=True)


def _until_done(state: State, *, content: bool) -> None:
    """Repeat until nothing changes; with `content`, only units that hold the same numbers."""
    while _by_habit(state, content=content) or _by_scope(state, content=content):
        pass


def forward(state: State) -> dict[str, str]:
    """Where each module of the actual side is on the reference."""
    return scopes((m.actual.name, m.reference.name) for m in state.matches)


def habits(state: State) -> Counter[Habit]:
    """How often each layer of a list names a parameter so on both sides."""
    found: Counter[Habit] = Counter()
    where = forward(state)
    for match in state.matches:
        found.update(habit for habit, _ in habits_of(match, where))
    return found


def habits_of(match: Match, where: dict[str, str]) -> Iterator[tuple[Habit, tuple[str, str]]]:
    """A pair as each list of layers around it sees it, with the two layers."""
    for scope in ancestors(match.actual.name):
        target = where.get(scope)
        if not target or not numbered_layer(scope) or not numbered_layer(target):
            continue
        if inside(match.reference.name, target):
            yield (
                Habit(
                    (scope.rpartition(".")[0], target.rpartition(".")[0]),
                    (relative(match.actual.name, scope), match.actual.place),
                    (relative(match.reference.name, target), match.reference.place),
                ),
                (scope, target),
            )


def numbered_layer(scope: str) -> bool:
    """Whether a module is one of a list."""
    return scope.rpartition(".")[2].isdecimal()


def _agreed(found: Counter[Habit]) -> list[Habit]:
    """Habits that no other contradicts, but for a few layers."""
    left: Counter[object] = Counter()
    right: Counter[object] = Counter()
    for habit, count in found.items():
        left[habit.containers, habit.actual] += count
        right[habit.containers, habit.reference] += count
    return [
        habit
        for habit, count in found.items()
        if count >= AGREEMENT * left[habit.containers, habit.actual]
        and count >= AGREEMENT * right[habit.containers, habit.reference]
    ]


def _by_habit(state: State, *, content: bool) -> bool:
    """Give a layer's parameters the places that they have in the list's other layers."""
    agreed: dict[tuple[str, str], list[Habit]] = {}
    for habit in _agreed(habits(state)):
        agreed.setdefault(habit.containers, []).append(habit)
    free = {unit.name for unit in state.free("actual")}, {u.name for u in state.free("reference")}
    changed = False
    for scope, target in forward(state).items():
        if not (numbered_layer(scope) and numbered_layer(target)):
            continue
        containers = (scope.rpartition(".")[0], target.rpartition(".")[0])
        for habit in agreed.get(containers, ()):
            own = Unit(f"{scope}.{habit.actual[0]}", habit.actual[1])
            theirs = Unit(f"{target}.{habit.reference[0]}", habit.reference[1])
            if own.name not in free[0] or theirs.name not in free[1]:
                continue
            if not (state.is_free(own, side="actual") and state.is_free(theirs, side="reference")):
                continue
            if _sizes(state, own, theirs) and (not content or state.fit(own, theirs)):
                state.add_by(own, theirs, Evidence.STRUCTURE, "as in the other layers")
                changed = True
    return changed


def _sizes(state: State, own: Unit, theirs: Unit) -> bool:
    """Whether two units hold as many numbers, and their rows exist."""
    for unit, side in ((own, "actual"), (theirs, "reference")):
        shape = state.shapes[side][unit.name]
        if unit.place and (
            len(shape) <= unit.place.axis or max(unit.place.rows) >= shape[unit.place.axis]
        ):
            return False
    return state.count(own, side="actual") == state.count(theirs, side="reference") > 0


def _by_scope(state: State, *, content: bool) -> bool:
    """Pair what is alone in its module with what is alone in the module that corresponds."""
    where = forward(state)
    own, theirs = state.free("actual"), state.free("reference")
    count = {
        unit: state.count(unit, side=side)
        for side, units in (("actual", own), ("reference", theirs))
        for unit in units
    }
    for unit in own:
        for scope in ancestors(unit.name):
            target = where.get(scope)
            if target is None or (not content and not (scope and target)):
                continue
            others = [o for o in theirs if inside(o.name, target) and count[o] == count[unit]]
            rivals = [o for o in own if inside(o.name, scope) and count[o] == count[unit]]
            if content:
                others = [o for o in others if state.fit(unit, o)]
                rivals = [o for o in rivals if any(state.fit(o, other) for other in others)]
            if not others:
                continue
            if len(others) > 1 or len(rivals) > 1:
                name = relative(unit.name, scope)
                others = [o for o in others if relative(o.name, target) == name]
                if len(others) != 1:
                    break  # a wider module has no fewer
                state.add_by(
                    unit, others[0], Evidence.STRUCTURE, _beside(scope, target, "same name")
                )
                return True
            state.add_by(
                unit, others[0], Evidence.STRUCTURE, _beside(scope, target, "all that is left")
            )
            return True
    return False


def _beside(scope: str, target: str, why: str) -> str:
    return f"{why} in {scope or 'the model'} = {target or 'the model'}"


def _by_names_against_content(state: State) -> None:
    """Equal names win over contents that changed places, where few did."""
    wrong = [
        m
        for m in state.matches
        if m.actual.name != m.reference.name
        and m.actual.name in state.reference
        and m.reference.name in state.actual
        and not (m.actual.place or m.reference.place)
        and m.evidence is not Evidence.RENAME
    ]
    if len(wrong) > FEW * len(state.matches):
        return
    wanted = {m.actual: Unit(m.actual.name) for m in wrong}
    _exchange(state, wrong, wanted, Evidence.NAME)


def _by_habit_against_content(state: State) -> None:
    """Where layers disagree, most of them (or the plainer names) say what belongs together."""
    where = forward(state)
    counts = habits(state)
    scores: dict[tuple[tuple[str, str], object], dict[Habit, float]] = {}
    for habit, count in counts.items():
        scores.setdefault((habit.containers, habit.actual), {})[habit] = count + _plain(habit)
    # Parts in the order of their definition are plainer than others.
    for match in state.matches:
        for habit, layers in habits_of(match, where):
            if _in_order(state, match, layers):
                scores[habit.containers, habit.actual][habit] += 0.4 / counts[habit]
    broken: dict[tuple[str, str], dict[int, tuple[Match, Unit]]] = {}
    for match in state.matches:
        for habit, layers in habits_of(match, where):
            rivals = scores[habit.containers, habit.actual]
            best = max(rivals, key=lambda h: rivals[h])
            if best != habit and f"{layers[1]}.{best.reference[0]}" in state.reference:
                wanted = Unit(f"{layers[1]}.{best.reference[0]}", best.reference[1])
                broken.setdefault(layers, {})[id(match)] = (match, wanted)
    for found in broken.values():
        matches = [match for match, _ in found.values()]
        wants = {match.actual: unit for match, unit in found.values()}
        if not _exchange(state, matches, wants, Evidence.EXCLUSION):
            for match in matches:
                match.odd = match.misplaced = True
                match.note = f"in other layers it is {relative(wants[match.actual].name, '')}"


def _plain(habit: Habit) -> float:
    """Up to 0.4 for names that look alike: it decides between as many layers on either side."""
    return 0.4 * SequenceMatcher(None, habit.actual[0], habit.reference[0]).ratio()


def _in_order(state: State, match: Match, layers: tuple[str, str]) -> bool:
    """Whether the parts of a fused tensor lie in it in the order of their definition."""
    fused = "actual" if match.actual.place else "reference" if match.reference.place else ""
    if not fused:
        return False
    name = getattr(match, fused).name
    order = list(state.reference if fused == "actual" else state.actual)
    parts = [m for m in state.matches if getattr(m, fused).name == name]
    parts.sort(key=lambda m: getattr(m, fused).place.rows[0])
    other = "reference" if fused == "actual" else "actual"
    places = [order.index(getattr(m, other).name) for m in parts]
    return places == sorted(places)


def _exchange(
    state: State, wrong: list[Match], wanted: dict[Unit, Unit], evidence: Evidence
) -> bool:
    """Pair anew what only changed places among itself; contents then differ, and are noted."""
    held = {match.reference: match for match in wrong}
    moving = {
        match.actual: wanted[match.actual]
        for match in wrong
        if wanted[match.actual] in held and _sizes(state, match.actual, wanted[match.actual])
    }
    if not moving or len(set(moving.values())) < len(moving) or len(moving) < len(wrong):
        return False
    if set(moving.values()) != set(held):
        return False
    for match in wrong:
        state.matches.remove(match)
    for match in wrong:
        note = f"holds the content of {match.reference.name}"
        if match.reference.place:
            note += f" [{match.reference.place}]"
        state.add_by(match.actual, moving[match.actual], evidence, note)
        state.matches[-1].odd = state.matches[-1].misplaced = True
    return True


def _leftover_names(state: State) -> None:
    """Names that both sides have left, whatever they hold now."""
    for unit in state.free("actual"):
        other = Unit(unit.name)
        if unit.place is not None or unit.name not in state.reference:
            continue
        if state.is_free(other, side="reference") and _sizes(state, unit, other):
            state.add_by(unit, other, Evidence.NAME)


def _last_one(state: State) -> None:
    """The only parameter that is left on either side."""
    own, theirs = state.free("actual"), state.free("reference")
    if len(own) == len(theirs) == 1 and _sizes(state, own[0], theirs[0]):
        state.add_by(own[0], theirs[0], Evidence.STRUCTURE, "all that is left in the model")


def _mark(state: State) -> None:
    """Mark pairs that are less exact, or laid out otherwise, than most of their kind."""
    where = forward(state)
    kinds: dict[object, list[Match]] = {}
    for match in state.matches:
        seen = [habit for habit, _ in habits_of(match, where)]
        kinds.setdefault(seen[-1] if seen else match.actual, []).append(match)
    everyone = [match for match in state.matches if match.evidence is not Evidence.EXCLUSION]
    axes = {id(m): len(state.shapes["reference"][m.reference.name]) for m in everyone}
    matrices = [m for m in everyone if axes[id(m)] == 2]
    # Quantisation leaves vectors as they are: matrices are compared with matrices.
    alike = {wide: [m for m in everyone if (axes[id(m)] > 1) is wide] for wide in (True, False)}
    for members in kinds.values():
        wide = axes.get(id(members[0]), 1) > 1
        group = members if len(members) > 2 else alike[wide]
        usual = Counter(_exactness(m) for m in group).most_common(1)
        layouts = members if len(members) > 2 else matrices
        common = Counter(m.layout for m in layouts).most_common(1)
        for match in members:
            if match.odd or not usual:
                continue
            level, most = _exactness(match), usual[0][0]
            if level > most or (level != most and most[0] == 2):
                match.odd, match.note = True, _less_exact(match)
            elif common and match.layout != common[0][0] and _square(state, match):
                plain = common[0][0] or "as it is"
                match.odd = match.misplaced = True
                match.note = f"others of its kind: {plain}"


def _exactness(match: Match) -> tuple[int, float]:
    """0 equal, 1 rounded, 2 scaled with the factor."""
    if match.distance == 0.0 and match.scale == 1.0:
        return (0, 0.0)
    if match.scale == 1.0:
        return (1, 0.0)
    return (2, round(match.scale, 3))


def _less_exact(match: Match) -> str:
    return "others of its kind have no factor" if match.scale != 1.0 else "others of its kind agree"


def _square(state: State, match: Match) -> bool:
    """Only a square matrix can be transposed by mistake without its shape telling."""
    shapes = {
        _shape(state, unit, side)
        for side, unit in (("actual", match.actual), ("reference", match.reference))
    }
    shape = shapes.pop()
    return not shapes and len(shape) == 2 and shape[0] == shape[1]


def _shape(state: State, unit: Unit, side: str) -> tuple[int, ...]:
    shape = list(state.shapes[side][unit.name])
    if unit.place is not None:
        shape[unit.place.axis] = len(unit.place.rows)
    return tuple(shape)


def ambiguous(state: State) -> tuple[list[Ambiguous], list[str], list[str]]:
    """Groups of free units that hold the same numbers, and all others that are free, by side."""
    own, theirs = state.free("actual"), state.free("reference")
    where = forward(state)
    groups: list[tuple[set[Unit], set[Unit]]] = []
    for unit in own:
        same = {other for other in theirs if state.fit(unit, other)}
        for scope in ancestors(unit.name):  # the module that corresponds, where it has any
            near = {o for o in same if scope in where and inside(o.name, where[scope])}
            if near:
                same = near
                break
        if not same:
            continue
        joined = [group for group in groups if group[1] & same]
        groups = [group for group in groups if group not in joined]
        mine = {unit}.union(*(group[0] for group in joined))
        groups.append((mine, same.union(*(group[1] for group in joined))))
    found = []
    for mine, others in groups:
        constant = all(state.constant(unit, side="actual") for unit in mine)
        found.append(
            Ambiguous(
                kind="parameter",
                actual=tuple(sorted(called_unit(u) for u in mine)),
                reference=tuple(sorted(called_unit(u) for u in others)),
                why="one value everywhere" if constant else "equal content",
            )
        )
    listed = [{unit for group in groups for unit in group[side]} for side in (0, 1)]
    left = [
        [called_unit(u) for u in units if u not in seen]
        for units, seen in zip((own, theirs), listed, strict=True)
    ]
    return found, left[0], left[1]


def called_unit(unit: Unit) -> str:
    """A name, with the rows where it is not the whole tensor."""
    return unit.name if unit.place is None else f"{unit.name} [{unit.place}]"

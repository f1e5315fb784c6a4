"""Search axes of changes: variables, packages, weights; which set of them makes the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from truestep.experiment.bisecting import changes as forms
from truestep.experiment.bisecting import checkpoints, packages
from truestep.experiment.bisecting.bisect import Options, probed
from truestep.experiment.bisecting.changes import Change, values_of
from truestep.experiment.bisecting.identity import fingerprint, interpreter_of
from truestep.experiment.bisecting.isolation import Place, Setting
from truestep.experiment.bisecting.records import Axis, Bisection, Culprit
from truestep.experiment.bisecting.running import Prober
from truestep.experiment.bisecting.search import Conclusion, budget, halvings, search
from truestep.experiment.bisecting.sets import Chosen, minimal
from truestep.experiment.bisecting.store import Store, key_of
from truestep.experiment.bisecting.telling import NOUNS, Answered, Ends, told, why_open
from truestep.text import pasteable

_HERE = "the command runs in this folder: what it leaves there is seen by later probes"
_ALONE = "versions are installed without their dependencies, before those of the environment"

SettingOf = Callable[[Mapping[str, str]], Setting]


def bisect_variables(folder: Path, specs: Sequence[str], options: Options) -> Bisection:
    """Find the variables, or the value of the one variable, that turned the command bad.

    Raises:
        UsageError: A spec is none, or another bisect is running.
    """
    changes = forms.variables(specs)

    def setting(values: Mapping[str, str]) -> Setting:
        @contextmanager
        def place(scratch: Path) -> Iterator[Place]:
            given: dict[str, str | None] = {name: value or None for name, value in values.items()}
            variables = {**given, "TRUESTEP_BISECT_ROOT": str(folder)}
            yield Place(folder, variables, {"repo": str(folder)})

        texts = [f"{name}={value}" if value else f"{name} unset" for name, value in values.items()]
        return Setting(key=key_of(texts), label=", ".join(texts), place=place)

    return _bisect(folder, "environment", changes, setting, options, (_HERE,))


def bisect_packages(folder: Path, specs: Sequence[str], options: Options) -> Bisection:
    """Find the package, and its version, that turned the command bad.

    Raises:
        UsageError: A spec is none, versions cannot be listed, or another bisect is running.
    """
    command = options.asked.command
    changes = [
        forms.between(said, packages.versions(said.name, command, folder) if said.ends_only else ())
        for said in forms.packages(specs)
    ]
    interpreter = interpreter_of(command, folder)
    overlays = packages.Overlays(Store(folder), interpreter, options.asked.again)

    def setting(values: Mapping[str, str]) -> Setting:
        return packages.setting(values, command, folder, overlays=overlays, kept=options.asked.kept)

    return _bisect(folder, "packages", changes, setting, options, (_ALONE, _HERE))


def _bisect(
    folder: Path,
    axis: Axis,
    changes: Sequence[Change],
    setting: SettingOf,
    options: Options,
    notes: Sequence[str],
) -> Bisection:
    """Which of the changes; then, of one that does it alone, from which of its values on."""
    one = changes[0] if len(changes) == 1 else None
    suspects = len(one.values) - 1 if one else len(changes)
    limit = budget(suspects) if options.most is None else options.most
    start, last = (setting(values_of(changes, c)).label for c in ((), range(len(changes))))
    ends = Ends(axis, start, last, suspects)

    def of(chosen: Chosen) -> Setting:
        return setting(values_of(changes, chosen))

    def answer(prober: Prober) -> Bisection:
        if one:
            return _values(prober, ends, one, {}, setting, notes, known=False)
        conclusion = prober.drive(minimal(len(changes), limit=options.most), of)
        alone = conclusion.point or ()
        if conclusion.kind == "found" and len(alone) == 1 and len(changes[alone[0]].values) > 2:
            guilty = changes[alone[0]]
            others = values_of(changes, ())
            prober.limit += budget(len(guilty.values) - 1)
            return _values(prober, ends, guilty, others, setting, notes, known=True)
        culprits = [_culprit(changes[at]) for at in alone]
        return _of_set(prober, ends, conclusion, culprits, of, notes)

    base = fingerprint(options.asked.command, folder)
    named = [f"{c.name}={c.values}" for c in changes]
    points = [of(()), of(tuple(range(len(changes))))]
    return probed(folder, key_of([base, axis, *named]), points, options, limit, answer)


def _culprit(change: Change) -> Culprit:
    return Culprit(name=change.name, text=change.text, before=change.values[0])


def _values(
    prober: Prober,
    ends: Ends,
    change: Change,
    others: Mapping[str, str],
    setting: SettingOf,
    notes: Sequence[str],
    *,
    known: bool,
) -> Bisection:
    """The first bad value of one change, all others at their good one.

    Args:
        known: Both of its ends were probed already.
    """
    last = len(change.values) - 1

    def of(at: int) -> Setting:
        return setting({**others, change.name: change.values[at]})

    limit = None if known else prober.limit
    conclusion = prober.drive(search(last, limit=limit, ends_known=known), of)
    noun = NOUNS[ends.axis] if ends.axis == "packages" else "value"
    if conclusion.kind != "found" or conclusion.point is None:
        reason = why_open(
            conclusion, lambda at: of(at).label, prober.attempts, noun, limit=prober.limit
        )
        culprits = [
            Culprit(name=change.name, text=change.values[at] or "(unset)")
            for at in conclusion.suspects
        ]
        return told(
            Answered(ends, prober.attempts, prober.limit, culprits, notes=notes),
            reason,
            found=False,
        )
    after, before = (
        change.values[at] or "(unset)" for at in (conclusion.point, conclusion.point - 1)
    )
    equals = " " if ends.axis == "packages" else "="
    sentence = f"{change.name}{equals}{after} did it; {before} is good"
    culprits = [Culprit(name=change.name, text=after, before=before)]
    keys = _keys(prober, of(conclusion.point), of(conclusion.point - 1))
    return told(
        Answered(ends, prober.attempts, prober.limit, culprits, keys, notes), sentence, found=True
    )


def _keys(prober: Prober, bad: Setting, good: Setting) -> tuple[str, str]:
    return prober.key_of_point(bad.key), prober.key_of_point(good.key)


def _of_set(
    prober: Prober,
    ends: Ends,
    conclusion: Conclusion[Chosen],
    culprits: Sequence[Culprit],
    of: Callable[[Chosen], Setting],
    notes: Sequence[str],
) -> Bisection:
    """A set of changes as the result."""
    names = [f"{each.name} ({each.text})" if each.text else each.name for each in culprits]
    if conclusion.kind == "found" and conclusion.point is not None:
        before = of(conclusion.before) if conclusion.before is not None else of(())
        keys = _keys(prober, of(conclusion.point), before)
        each = f"{' and '.join(names)} together did it: none of them alone"
        sentence = each if len(names) > 1 else f"{names[0]} did it"
        answered = Answered(ends, prober.attempts, prober.limit, culprits, keys, notes)
        return told(answered, sentence, found=True)
    noun = NOUNS[ends.axis]
    reason = why_open(
        conclusion, lambda at: of(at).label, prober.attempts, noun, limit=prober.limit
    )
    if conclusion.kind == "narrowed":
        reason = f"these {len(names)} do it together, and fewer may: {', '.join(names[:3])}"
    answered = Answered(ends, prober.attempts, prober.limit, culprits, notes=notes)
    return told(answered, reason, found=False)


def bisect_weights(folder: Path, spec: str, options: Options) -> Bisection:
    """Find the tensors that turned the command bad: components first, then modules, then tensors.

    Raises:
        UsageError: The spec names no two checkpoints, they are the same, or another bisect runs.
        FileFormatError: A file of tensors cannot be read.
    """
    found = checkpoints.pair(spec)
    identity = checkpoints.identity(found)
    everything = list(found.items)
    first = checkpoints.groups(everything)
    limit = _with_ends(len(first)) if options.most is None else options.most
    ends = Ends("weights", str(found.good.root), str(found.bad.root), len(everything))
    whole = [item for item in everything if item.kind == "component"]
    notes = [_HERE] + [
        f"tensors of {item.name} do not pair by name: it is exchanged whole" for item in whole
    ]
    if not any("{weights}" in word for word in options.asked.command):
        notes.append("no word of the command is {weights}: it has to read TRUESTEP_WEIGHTS itself")

    def of(items: Sequence[checkpoints.Item]) -> Setting:
        return checkpoints.setting(found, items, folder, identity)

    def answer(prober: Prober) -> Bisection:
        return _descend(prober, ends, everything, of, notes, options.most)

    base = key_of([fingerprint(options.asked.command, folder), identity])
    return probed(folder, base, [of([]), of(everything)], options, limit, answer)


def _descend(
    prober: Prober,
    ends: Ends,
    items: list[checkpoints.Item],
    of: Callable[[Sequence[checkpoints.Item]], Setting],
    notes: Sequence[str],
    most: int | None,
) -> Bisection:
    """Groups of items, then the groups in the one that does it, down to what cannot be divided."""
    known = False
    while True:
        groups = checkpoints.groups(items)

        def chosen(
            at: Chosen, groups: list[tuple[str, list[checkpoints.Item]]] = groups
        ) -> Setting:
            return of([item for place in at for item in groups[place][1]])

        limit = max(prober.limit - prober.probes, 4) if most is not None or not known else None
        conclusion = prober.drive(minimal(len(groups), limit=limit, ends_known=known), chosen)
        guilty = conclusion.point or ()
        inner = groups[guilty[0]][1] if len(guilty) == 1 else []
        if conclusion.kind != "found" or len(inner) < 2:
            break
        items, known = inner, True
        prober.limit += budget(len(checkpoints.groups(items))) if most is None else 0
    culprits = [Culprit(name=groups[at][0], text=_counted(groups[at][1])) for at in guilty]
    result = _of_set(prober, ends, conclusion, culprits, chosen, notes)
    return result.model_copy(
        update={"next": pasteable(["truestep", "weights", ends.bad, ends.good])}
    )


def _with_ends(groups: int) -> int:
    """Probes of the first groups: both ends twice, the search, and the pair again."""
    return max(budget(groups), 7 + halvings(groups))


def _counted(items: Sequence[checkpoints.Item]) -> str:
    kinds = {item.kind for item in items}
    noun = kinds.pop() if len(kinds) == 1 else "difference"
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"

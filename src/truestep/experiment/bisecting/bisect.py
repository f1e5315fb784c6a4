"""Search an axis: make its points, ask, and say what made the difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from truestep.environment import library_version
from truestep.experiment.bisecting import commits
from truestep.experiment.bisecting.identity import fingerprint
from truestep.experiment.bisecting.isolation import Setting
from truestep.experiment.bisecting.records import Bisection, Culprit
from truestep.experiment.bisecting.running import Asked, Prober, Told
from truestep.experiment.bisecting.search import Conclusion, budget, search
from truestep.experiment.bisecting.store import Store, key_of
from truestep.experiment.bisecting.telling import NOUNS, Answered, Ends, told, why_open
from truestep.text import listed, pasteable, quoted

_MOST_FILES = 20


@dataclass(frozen=True)
class Options:
    """How a bisect is done, whatever its axis.

    Attributes:
        most: Runs of the command; None is what `budget` allows.
        imports: Packages that must come from what is probed.
        progress: Is told of each probe.
    """

    asked: Asked
    most: int | None = None
    imports: Sequence[str] = ()
    progress: Told = lambda what, done, most: None


def bisect_commits(folder: Path, good: str, bad: str, options: Options) -> Bisection:
    """Find the commit that turned the command from good to bad.

    Args:
        folder: In the repository; a relative path of the command begins at the same folder of each
            worktree.
        good, bad: Revisions.

    Raises:
        UsageError: There is no line between them, or another bisect is running.
        WriteError: What a bisect keeps cannot be written.
    """
    line = commits.line_of(folder, good, bad)
    asked = options.asked
    points = commits.settings(
        line, asked.command, folder=folder, names=options.imports, kept=asked.kept
    )
    ends = Ends("commits", line.points[0].label, line.points[-1].label, len(points) - 1)
    limit = budget(ends.suspects) if options.most is None else options.most

    def answer(prober: Prober) -> Bisection:
        conclusion = prober.drive(search(ends.suspects, limit=limit), points.__getitem__)
        result = _of_commits(line, conclusion, prober, ends)
        blind = conclusion.kind == "ends" and not options.imports
        return _perhaps_blind(result, line, good, bad, asked) if blind else result

    with_root = [word.replace("{repo}", str(line.repository)) for word in asked.command]
    base = fingerprint(with_root, folder)
    return probed(line.repository, base, points, options, limit, answer)


def probed(
    root: Path,
    base: str,
    points: Sequence[Setting],
    options: Options,
    limit: int,
    answer: Callable[[Prober], Bisection],
) -> Bisection:
    """Answer with a prober, whose log goes when there is an answer."""
    store = Store(root)
    store.prepare()
    version, imports = library_version("truestep") or "", ",".join(sorted(options.imports))
    base = key_of([base, version, imports, *sorted(options.asked.kept)])
    patience = str(options.asked.timeout_s)
    key = key_of([base, str(limit), patience, *(point.key for point in points)])
    with store.locked(), commits.scratch_folder(root) as scratch:
        prober = Prober(store, key, base, scratch, options.asked, limit, options.progress)
        prober.begin()
        result = answer(prober)
        notes = [*result.notes]
        if prober.outdated:
            spent = prober.probes
            store.drop(base)
            asked = replace(options.asked, again=True)
            prober = Prober(store, key, base, scratch, asked, limit, options.progress)
            prober.begin()
            result = answer(prober)
            notes = [_outdated(spent), *result.notes]
        prober.end()
    if prober.resumed:
        notes.insert(0, f"{prober.resumed} answers are of an earlier start, which was stopped")
    kept = sum(not a.ran and a.exit_code is not None for a in prober.attempts)
    if kept:
        many = "verdicts were" if kept > 1 else "verdict was"
        notes.append(f"{kept} {many} kept, of the same content (--again runs them)")
    return result.model_copy(update={"notes": tuple(notes), "tool_version": version})


def _outdated(spent: int) -> str:
    return (
        "answers of an earlier start or bisect no longer hold (something changed that is not "
        f"recorded): all were dropped after {spent} runs, and the search was begun again"
    )


def _of_commits(
    line: commits.Line, conclusion: Conclusion[int], prober: Prober, ends: Ends
) -> Bisection:
    points = line.points
    noun = NOUNS["commits"]
    if conclusion.kind not in ("found", "narrowed") or conclusion.point is None:
        sentence = why_open(
            conclusion, lambda at: points[at].label, prober.attempts, noun, limit=prober.limit
        )
        further = _further(conclusion, points, prober)
        answered = Answered(ends, prober.attempts, prober.limit, notes=line.notes, next=further)
        return told(answered, sentence, found=False)
    before = points[conclusion.before or 0]
    suspects = [points[at] for at in conclusion.suspects]
    culprits = [_culprit(line.repository, before, commit) for commit in suspects]
    last = suspects[-1]
    keys = (prober.key_of_point(last.tree), prober.key_of_point(before.tree))
    if conclusion.kind == "found":
        sentence = f"commit {last.label} did it{_files(culprits[-1].files)}"
        command = ["git", "show", last.short]
        notes = [*line.notes]
        if len(last.parents) > 1:
            sentence = f"merge {last.label} did it{_files(culprits[-1].files)}"
            notes.append("it is a merge: one of the commits that it brought, or the merge itself")
            inside = ["truestep", "bisect", "--good", before.short, "--bad", last.parents[1][:12]]
            command = [*inside, "--", *prober.asked.command]
        answered = Answered(
            ends, prober.attempts, prober.limit, culprits, keys, notes, pasteable(command)
        )
        return told(answered, sentence, found=True)
    sentence = why_open(
        conclusion, lambda at: points[at].label, prober.attempts, noun, limit=prober.limit
    )
    command = ["git", "log", "--first-parent", "--stat", f"{before.short}..{last.short}"]
    answered = Answered(
        ends, prober.attempts, prober.limit, culprits, keys, line.notes, pasteable(command)
    )
    return told(answered, sentence, found=False)


def _perhaps_blind(
    result: Bisection, line: commits.Line, good: str, bad: str, asked: Asked
) -> Bisection:
    """Of ends that do not differ: the same with --import, where that may be why."""
    found = commits.blind(line.repository, asked.command)
    if not found:
        return result
    name, origin = next(iter(found.items()))
    note = f"if the command imports {name}, that is {origin}, not the probed commit's"
    words = ["truestep", "bisect", "--import", name, "--good", good, "--bad", bad, "--"]
    return result.model_copy(
        update={"notes": (note, *result.notes), "next": pasteable([*words, *asked.command])}
    )


def _further(conclusion: Conclusion[int], points: Sequence[commits.Commit], prober: Prober) -> str:
    """Of a line that turns twice: the search from where it is good again."""
    if conclusion.kind != "turns" or conclusion.before is None or conclusion.point is None:
        return ""
    good, bad = points[conclusion.before], points[-1]
    if conclusion.before < conclusion.point:
        good, bad = points[0], points[conclusion.point]
    command = pasteable(prober.asked.command)
    return f"truestep bisect --good {quoted(good.short)} --bad {quoted(bad.short)} -- {command}"


def _culprit(repository: Path, before: commits.Commit, commit: commits.Commit) -> Culprit:
    parent = commit.parents[0] if commit.parents else before.sha
    files = commits.files_changed(repository, parent, commit.sha)[:_MOST_FILES]
    return Culprit(name=commit.sha, text=commit.subject, before=before.sha, files=files)


def _files(files: Sequence[str]) -> str:
    """What a commit changed, in brackets."""
    return f" ({listed(files, 2)})" if files else ""

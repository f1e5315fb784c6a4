"""Two folders of runs: files matched by their names, and what has no partner listed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from truestep.environment import library_version
from truestep.errors import FileFormatError, UsageError
from truestep.judge.media_files import NONE, MediaOptions, compare_media
from truestep.judge.rows import NOTHING
from truestep.measure.perceptual import require_perceptual
from truestep.recording.clips import is_media, is_sequence, media_files
from truestep.verdict import Comparison, Side, Verdict


def are_runs(actual: Path, reference: Path, options: MediaOptions = NONE) -> bool:
    """Whether both are folders of runs, each file one of its own, not the frames of one clip."""
    if not all(path.is_dir() and is_media(path) for path in (actual, reference)):
        return False
    return not (options.is_clip(actual) and options.is_clip(reference))


def compare_folders(
    actual: Path, reference: Path, *, options: MediaOptions = NONE
) -> list[Comparison]:
    """Judge all runs of two folders, one comparison a name; nothing is left out.

    A file that cannot be decoded is `invalid` and does not end the others; one that only one side
    has is `missing`.

    Raises:
        FileFormatError: A run of a ladder cannot be decoded.
        UsageError: The package of ColorVideoVDP is not there, or a run of a ladder is of another
            size.
    """
    if options.perceptual:
        require_perceptual()
    sides = [runs_by_name(folder) for folder in (actual, reference)]
    pairs = list(matched(*sides))
    results = []
    for name, own, other in pairs:
        if own is None or other is None:
            results.append(_alone(name, actual, reference, own, other))
            continue
        try:
            result = compare_media(own, other, options=_present(options, name, own.name))
        except FileFormatError as error:
            if error.where not in (str(own), str(other)):  # a run of the ladder: nothing was judged
                raise
            result = _unread(name, own, other, error)
        results.append(result.model_copy(update={"case_id": name}))
    return _duplicates(results)


def runs_by_name(folder: Path) -> dict[str, Path]:
    """Files and folders of frames in a folder, by their path in it."""
    runs: dict[str, Path] = {}
    for path in media_files(folder):
        above = [each for each in path.parents if folder in each.parents]
        clip = next((each for each in above if is_sequence(each)), path)
        runs[str(clip.relative_to(folder).as_posix())] = clip
    return runs


def matched(
    actual: Mapping[str, Path], reference: Mapping[str, Path]
) -> Iterator[tuple[str, Path | None, Path | None]]:
    """Name, file of one side, file of the other: by equal names, then by names that are equal but
    for the suffix and are there once on each side."""
    stems = [defaultdict[str, list[str]](list) for _ in range(2)]
    for table, side, facing in zip(stems, (actual, reference), (reference, actual), strict=True):
        for name in side.keys() - facing.keys():
            table[str(PurePosixPath(name).with_suffix(""))].append(name)
    partner = {
        names[0]: stems[1][stem][0]
        for stem, names in stems[0].items()
        if len(names) == 1 and len(stems[1].get(stem, ())) == 1
    }
    taken = set(partner.values())
    for name, own in actual.items():
        other = reference.get(name) or reference.get(partner.get(name, ""))
        yield name, own, other
    for name, path in reference.items():
        if name not in actual and name not in taken:
            yield name, None, path


def _present(options: MediaOptions, name: str, file: str) -> MediaOptions:
    """The runs of the ladder of one name, those that there are."""
    chosen = options.of(name)
    for path, folder in zip(
        (*chosen.same_seed, *chosen.other_seeds),
        (*options.same_seed, *options.other_seeds),
        strict=True,
    ):
        if not path.exists():
            raise UsageError(
                "a folder of other runs lacks one of that name",
                where=str(folder),
                measured=f"no {name} in it",
            )
    return chosen


def _alone(
    name: str, actual: Path, reference: Path, own: Path | None, other: Path | None
) -> Comparison:
    side, folder = ("actual", actual) if other is None else ("reference", reference)
    text = f"{name} is on the {side} side only ({folder})"
    missing: dict[str, Any] = {"missing" if own is None else "unexpected": (name,)}
    sides = own or actual, other or reference
    return _unjudged(Verdict.MISSING, text, *sides, case_id=name, **missing)


def _unread(name: str, own: Path, other: Path, error: FileFormatError) -> Comparison:
    text = f"{error.what}: {error.measured} ({error.where})"
    return _unjudged(Verdict.INVALID, text, own, other)


def _unjudged(verdict: Verdict, text: str, own: Path, other: Path, **more: Any) -> Comparison:
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=verdict,
        sentence=f"{verdict.value}: {text}",
        notes=(text,),
        rule=NOTHING,
        actual=_side(own),
        reference=_side(other),
        **more,
    )


def _side(path: Path) -> Side:
    return Side(label=str(path), path=str(path))


def _duplicates(results: list[Comparison]) -> list[Comparison]:
    """Results with a note where files of two names of one side are the same, those of the other
    are not: a prompt or a seed that has no effect."""
    by_actual = defaultdict[str, list[int]](list)
    for at, result in enumerate(results):
        if result.actual.sha256:
            by_actual[result.actual.sha256].append(at)
    for places in by_actual.values():
        if len({results[at].reference.sha256 for at in places}) < 2:
            continue
        for at in places:
            others = [results[i].case_id or "" for i in places if i != at]
            note = (
                f"its file is that of {', '.join(others[:3])}, byte for byte, "
                "where the reference's differ: a prompt or seed without effect?"
            )
            update = {"notes": (*results[at].notes, note)}
            results[at] = results[at].model_copy(update=update)
    return results

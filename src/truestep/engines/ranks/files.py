"""Which recordings are of one run: a file each rank, found beside each other or named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.calls.recording import CallRecording
from truestep.engines.assembling import ENGINE, PARTIAL
from truestep.engines.named import calls_of
from truestep.errors import UsageError
from truestep.text import quoted

_NAME = re.compile(r"(?P<stem>.+)\.rank(?P<rank>\d{1,6})(?P<number>\.\d+)?")


@dataclass(frozen=True)
class RankFile:
    """The recording of one rank.

    Attributes:
        path: Where it is.
        recording: Its calls.
        rank: Of its process.
        ranks: How many processes ran.
    """

    path: Path
    recording: CallRecording
    rank: int
    ranks: int

    @property
    def partial(self) -> bool:
        """Whether its process ended before the generation was over."""
        return PARTIAL in self.recording.recording.manifest.notes


def files_of(paths: Sequence[Path]) -> list[RankFile]:
    """Recordings of all ranks of a run, by rank; none where the path is no rank's.

    Args:
        paths: All of them; or one, beside which the others are; or what `engine run` was told to
            write.

    Raises:
        FileFormatError: One cannot be read.
        UsageError: Ranks are not there, or more often than once, or are of several runs.
    """
    named = list(paths)
    if len(named) == 1:
        named = _beside(named[0]) or named
    found = [_opened(path) for path in named]
    ranks = [one for one in found if one is not None]
    if len(named) > 1 and len(ranks) < len(named):
        other = next(path for path, one in zip(named, found, strict=True) if one is None)
        raise UsageError(
            "a file is no recording of a rank",
            where=str(other),
            measured=f"{len(named)} files, {len(ranks)} of them of ranks",
            hint=f"truestep show {quoted(str(other))}",
        )
    if not ranks:
        return []
    ranks.sort(key=lambda one: one.rank)
    _require_all(ranks, given=len(paths))
    return ranks


def _beside(path: Path) -> list[Path]:
    """Recordings of the same generation beside a path, by their names."""
    match = _NAME.fullmatch(path.stem)
    if match is None and path.exists():
        return []
    stem, number = (match["stem"], match["number"] or "") if match else (path.stem, "")
    found: dict[int, Path] = {}
    for other in sorted(path.parent.glob(f"*{path.suffix}")):
        its = _NAME.fullmatch(other.stem)
        if its is not None and (its["stem"], its["number"] or "") == (stem, number):
            found.setdefault(int(its["rank"]), other)
    return [found[rank] for rank in sorted(found)]


def _opened(path: Path) -> RankFile | None:
    recording = calls_of(path)
    if recording is None:
        return None
    own: Any = recording.recording.manifest.settings.get(ENGINE, {})
    rank, ranks = own.get("rank"), own.get("ranks")
    if type(rank) is not int or rank < 0:
        return None
    return RankFile(path, recording, rank, ranks if type(ranks) is int and ranks > 1 else 0)


def _require_all(ranks: Sequence[RankFile], *, given: int) -> None:
    known = {one.ranks for one in ranks if one.ranks}
    if len(known) > 1:
        raise UsageError(
            "the recordings are of several runs",
            measured="; ".join(f"{one.path.name}: of {one.ranks} ranks" for one in ranks[:8]),
            hint=f"truestep show {quoted(str(ranks[0].path))}",
        )
    seen: dict[int, RankFile] = {}
    for one in ranks:
        if one.rank in seen:
            raise UsageError(
                f"two recordings are of rank {one.rank}",
                measured=f"{seen[one.rank].path}, {one.path}",
                likely="they are of several generations, or one is named twice",
                hint=f"truestep show {quoted(str(one.path))}",
            )
        seen[one.rank] = one
    count = next(iter(known), max(seen) + 1)
    over = sorted(rank for rank in seen if rank >= count)
    if over:
        raise UsageError(
            "there are more recordings than ranks",
            measured=f"rank {over[0]} of a run on {count}",
            where=str(seen[over[0]].path),
            hint=f"truestep show {quoted(str(seen[over[0]].path))}",
        )
    missing = [str(rank) for rank in range(count) if rank not in seen]
    if missing:
        how = "named" if given > 1 else "there"
        raise UsageError(
            "not all ranks of the run are there",
            where=str(ranks[0].path.parent),
            measured=f"{count} ranks ran, recordings of {len(ranks)} are {how}; "
            f"missing: rank {', '.join(missing[:8])}",
            likely="a rank was killed before its first call, or its recording is elsewhere",
            hint=f"truestep show {quoted(str(ranks[0].path))}",
        )

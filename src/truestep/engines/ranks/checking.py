"""The verdict on a run by the paths of its recordings: of one process, or of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from truestep.engines.inner import Depth
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.predictions import nearness
from truestep.engines.ranks.files import RankFile, files_of
from truestep.engines.ranks.gathering import Gathered, gather
from truestep.engines.ranks.naming import explained
from truestep.engines.run import Run
from truestep.engines.trusted import Trusted
from truestep.errors import UsageError
from truestep.progress import Progress
from truestep.text import quoted
from truestep.verdict import Comparison


def check_paths(
    paths: Sequence[Path],
    model: Path,
    *,
    reference: Run | None = None,
    depth: Depth = "steps",
    progress: Progress | None = None,
) -> Comparison:
    """Judge a run by a trusted model folder.

    Args:
        paths: A recording, or those of all ranks, or one of these beside the others.
        model: Folder of diffusers with the same weights.
        reference: The trusted pipeline's run of the same case.
        depth: At `modules`, also name the module in which a red prediction goes wrong; of several
            ranks that is done whenever modules were recorded.
        progress: Told (what, done, total).

    Raises:
        FileFormatError: A recording cannot be read.
        ModelLoadError: The trusted model cannot be loaded.
        UsageError: A rank is not there, the ranks have other numbers of steps, or there are none.
    """
    files = files_of(paths)
    if not files:
        if len(paths) != 1:
            raise UsageError(
                "these are no recordings of the ranks of one run",
                measured=", ".join(map(str, paths[:8])),
                hint=f"truestep show {quoted(str(paths[0]))}",
            )
        run = run_of(paths[0])
        return check_run(run, model, reference=reference, depth=depth, progress=progress)
    gathered = gathered_from(files, model, reference)
    result = check_run(gathered.run, model, reference=reference, depth=None, progress=progress)
    first = result.first_divergence
    if result.verdict.passed or first is None:
        return result
    trusted = Trusted(model, gathered.run.dtype)
    notes = explained(gathered, reference, trusted, first.name)
    return result.model_copy(update={"notes": (*notes, *result.notes)})


def gathered_from(files: Sequence[RankFile], model: Path, reference: Run | None) -> Gathered:
    """One run of the recordings of all ranks; the trusted model is asked where only it can tell.

    Raises:
        ModelLoadError: The trusted model is asked, and cannot be loaded.
        UsageError: The ranks have other numbers of steps, or their latents are no pieces of one.
    """
    trusted: list[Trusted] = []

    def score(run: Run) -> float:
        if not trusted:
            trusted.append(Trusted(model, run.dtype))
        return nearness(run, reference, trusted[0])

    return gather(files, known=reference, score=score)

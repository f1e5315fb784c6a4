"""The folder of `ab --quality`: a line a generation, flushed; readable after any crash.

::

    DIR/plan.json                    what was asked
    DIR/sources.json                 digests of the user's files that were run
    DIR/clips.jsonl                  one line a generation: numbers of every metric, no frames
    DIR/latents/N-S.safetensors      the baseline's final latent of prompt N, seed S
    DIR/result.json, table.md        what came out
    DIR/frontier.svg                 with --frontier
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from truestep.errors import FileFormatError
from truestep.experiment.quality.records import Clip, QualityPlan
from truestep.experiment.sources import Sources
from truestep.experiment.store import append_line, begin, keep, read_lines
from truestep.files import replacing
from truestep.reading import parse_json, read

if TYPE_CHECKING:
    import torch

_FREE = ("tool_version", "margin", "margins", "broken", "two_sided", "mechanisms")
"""What of a plan decides no generation: it may be another when one goes on."""


class QualityStore:
    """The folder of one experiment.

    Args:
        sources: The user's files that are run, which are kept with what they made.
    """

    def __init__(self, folder: str | Path, *, sources: Sources | None = None) -> None:
        self.folder, self.sources = Path(folder), sources

    def begin(self, plan: QualityPlan, *, resume: bool) -> None:
        """Write the plan, or make sure that the one that is there is the same.

        Raises:
            UsageError: There is an experiment already and `resume` is off, there is none to
                resume, or the one there is another.
        """
        hint = "--resume  # goes on with it; another --output keeps it"
        begin(self.folder, plan, self.plan, self.sources, resume=resume, free=_FREE, hint=hint)

    def plan(self) -> QualityPlan:
        """What was asked.

        Raises:
            FileFormatError: There is no plan of this kind here, or it is damaged.
        """
        return read(
            self.folder / "plan.json",
            "this is not the folder of ab --quality, or its plan is damaged",
            lambda data: QualityPlan.model_validate(parse_json(data)),
        )

    def append(self, clip: Clip) -> None:
        """Keep a generation.

        Raises:
            WriteError: It could not be written; those before it are untouched.
        """
        keep(self.sources, self.folder)
        append_line(self.folder / "clips.jsonl", clip.model_dump_json(), "the clips")

    def clips(self) -> tuple[list[Clip], list[str]]:
        """Every generation that can be read, the last of each place; and what is said of others."""
        path = self.folder / "clips.jsonl"
        clips, damaged = read_lines(path, "the clips", Clip.model_validate_json)
        found = {(clip.cell, clip.case, clip.seed): clip for clip in clips}
        places = ", ".join(map(str, damaged[:5]))
        said = [f"{len(damaged)} damaged lines left out: clips.jsonl, line {places}"]
        return list(found.values()), said if damaged else []

    def save_latent(self, case: int, seed: int, latent: torch.Tensor) -> None:
        """Keep the baseline's final latent."""
        from safetensors.torch import save

        path = self._latent(case, seed)
        with replacing(path, "the latent") as temporary:
            temporary.write_bytes(save({"latent": latent.contiguous().clone()}))

    def latent(self, case: int, seed: int) -> torch.Tensor | None:
        """The baseline's final latent; None where there is none that can be read."""
        from truestep.recording.format import read_plain

        try:
            return dict(read_plain(self._latent(case, seed))).get("latent")
        except FileFormatError:
            return None

    def _latent(self, case: int, seed: int) -> Path:
        return self.folder / "latents" / f"{case}-{seed}.safetensors"

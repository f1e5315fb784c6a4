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

from pydantic import ValidationError

from truestep.errors import FileFormatError, UsageError
from truestep.experiment.quality.records import Clip, QualityPlan
from truestep.experiment.sources import Sources
from truestep.experiment.store import append_line
from truestep.files import replacing, write_text
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
        path = self.folder / "plan.json"
        if path.exists() is not resume:
            raise UsageError(
                "there is an experiment in this folder already"
                if path.exists()
                else "there is no experiment to resume",
                where=str(self.folder),
                hint="--resume  # goes on with it; another --output keeps it"
                if path.exists()
                else "leave out --resume to begin one",
            )
        if resume:
            ours, theirs = (p.model_dump(mode="json") for p in (plan, self.plan()))
            changed = [key for key in ours if key not in _FREE and ours[key] != theirs[key]]
            if changed:
                raise UsageError(
                    f"the experiment in this folder is another one: {', '.join(changed)} changed",
                    where=str(path),
                    hint="give another --output",
                )
            if self.sources is not None:
                self.sources.check(self.folder)
        write_text(path, plan.model_dump_json(indent=1), "the plan")
        self._keep_sources()

    def _keep_sources(self) -> None:
        if self.sources is not None:
            self.sources.keep(self.folder)

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
        self._keep_sources()
        append_line(self.folder / "clips.jsonl", clip.model_dump_json(), "the clips")

    def clips(self) -> tuple[list[Clip], list[str]]:
        """Every generation that can be read, the last of each place; and what is said of others."""
        path = self.folder / "clips.jsonl"
        if not path.exists():
            return [], []
        found: dict[tuple[str, int, int], Clip] = {}
        damaged = []
        for number, text in enumerate(
            read(path, "the clips cannot be read", bytes).split(b"\n"), 1
        ):
            if not text.strip():
                continue
            try:
                clip = Clip.model_validate_json(text)
            except ValidationError:
                damaged.append(number)
            else:
                found[clip.cell, clip.case, clip.seed] = clip
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

"""`truestep gate selftest`: does a gate notice damage at all?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.cases import chosen_or_recorded, find_reference
from truestep.cli.common import (
    case_options,
    end,
    give,
    json_option,
    print_screen,
    progress_bar,
    verbose,
    verbose_option,
)
from truestep.screen import aligned, rows

if TYPE_CHECKING:
    import torch

    from truestep.gates.kinds import Gate
    from truestep.gates.selftest import Selftest
    from truestep.recording.format import Recording


@click.command("selftest")
@case_options
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME[:LIMITS]",
    help="Also test cosine, allclose, slice or cosine-one (on latents); ssim, ms-ssim, psnr, mad "
    "or sglang (on decoded frames).  [default: cosine:5e-3,1e-2]",
)
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--reference", type=click.Path(path_type=Path), help="One recording file.")
@json_option
@verbose_option
def selftest(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    gates: tuple[str, ...],
    references: Path | None,
    reference: Path | None,
    json_path: str | None,
) -> None:
    """Damage a reference's tensors in standard ways and say which gates notice.

    Damages the final latent, the middle step's prediction and the decoded frames. Runs no model.
    truestep's own rule is always among the gates. Exit code 1 says that it let a damage live.
    """
    from truestep.environment import command_line, library_version
    from truestep.gates.kinds import parse_gate
    from truestep.gates.selftest import Selftests, table

    chosen = [parse_gate(text) for text in gates or ("cosine:5e-3,1e-2",)]
    cases = chosen_or_recorded(
        names,
        reference=reference,
        references=references,
        case_file=case_file,
        prompt=prompt,
        tier=tier,
    )
    results: list[Selftest] = []
    for name, case in cases.items():
        path = reference or find_reference(name, case, references=references, tier=tier)
        with progress_bar() as progress:
            results.append(_scored(name, case.dtype, path, chosen, progress))
    found = Selftests(
        tool_version=library_version("truestep") or "",
        repeat=command_line(),
        results=tuple(results),
    )

    def show() -> None:
        caught = all(not result.scores[0].survived for result in results)
        said = [result.sentence for result in results]
        word = "PASSED" if caught else "FAILED"
        lines = [line for result in results for line in table(result.scores)]
        head = f"{word} {'; '.join(said)}"
        listed = rows(lines) if verbose() else rows(_short(results), "gates")
        print_screen(head, listed, exit_code=0 if caught else 1)

    give(found, json_path=json_path, show=show)
    end(1 if any(result.scores[0].survived for result in results) else 0)


def _short(results: Sequence[Selftest]) -> list[str]:
    """A row a gate: what it caught, and the smallest noise, gain and shift that it sees."""
    from truestep.gates.selftest import amount

    cells: list[tuple[str, ...]] = [("gate", "caught", "noise", "gain", "shift", "lets live")]
    for result in results:
        for found in result.scores:
            amounts = (found.smallest_noise, found.smallest_gain, found.smallest_shift)
            live = ", ".join(dict.fromkeys(damage for damage, _ in found.survived)) or "-"
            counts = f"{found.caught} of {len(found.trials)}"
            cells.append((found.gate, counts, *map(amount, amounts), live))
    return aligned(cells, left=(0, 5))


def _scored(
    name: str,
    dtype: str,
    path: Path,
    gates: list[Gate],
    progress: Callable[[str, int, int], None] | None,
) -> Selftest:
    from truestep.gates.selftest import Selftest, score, sentence, suited, truestep_gate
    from truestep.judge.floor import pair_of
    from truestep.recording.format import Recording
    from truestep.verdict import Side

    recording = Recording.open(path)
    tensors = _tensors(name, recording)
    ours = truestep_gate(recording.manifest.noise_floor, pair=pair_of(dtype, dtype))
    for gate in (ours, *gates):  # none is tried before all can be
        suited(gate, tensors)
    scores = []
    for done, gate in enumerate((ours, *gates), start=1):
        scores.append(score(gate, tensors))
        if progress is not None:
            progress("gates", done, len(gates) + 1)
    environment = dict(recording.manifest.environment)
    return Selftest(
        name=name,
        sentence=sentence(name, scores),
        tensors=tuple(tensors),
        reference=Side(label="reference", path=str(path), environment=environment),
        scores=tuple(scores),
    )


def _tensors(name: str, recording: Recording) -> dict[str, torch.Tensor]:
    """Final latent, the middle step's prediction and, where they were recorded, the frames."""
    from truestep.errors import UsageError
    from truestep.keys import step_name
    from truestep.replay.steps import steps_recorded

    if recording.manifest.level != "full":
        raise UsageError(
            "the reference holds no tensors to damage",
            where=str(recording.path),
            measured=f"recorded at level {recording.manifest.level}; needed: full",
            hint="truestep record CASE --level full --update",
        )
    wanted = ["latent/final", step_name(steps_recorded(recording) // 2, "cond"), "video/frames"]
    return {key: recording[key] for key in wanted if key in recording}

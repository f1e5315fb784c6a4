"""`truestep selftest`: does a gate notice damage at all?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from truestep.cli.common import case_options, choose_cases, find_reference


@click.command("selftest")
@case_options
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME",
    help="Also test cosine:SLICE,FULL or allclose:TOLERANCE.  [default: cosine:5e-3,1e-2]",
)
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--reference", type=click.Path(path_type=Path), help="One recording file.")
def command(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    gates: tuple[str, ...],
    references: Path | None,
    reference: Path | None,
) -> None:
    """Damage a reference's tensors in standard ways and say which gates notice.

    Damages the final latent and the middle step's prediction. Runs no model.
    """
    from truestep import selftest
    from truestep.noise import pair_of
    from truestep.recording.format import Recording
    from truestep.recording.names import step_name
    from truestep.recording.replay import steps_recorded

    chosen = [selftest.parse_gate(text) for text in gates or ("cosine:5e-3,1e-2",)]
    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    survivors = 0
    for name, case in cases.items():
        path = reference or find_reference(name, case, references=references, tier=tier)
        recording = Recording.open(path)
        middle = step_name(steps_recorded(recording) // 2, "cond")
        tensors = {key: recording[key] for key in ("latent/final", middle)}
        ours = selftest.truestep_gate(
            recording.manifest.noise_floor, pair=pair_of(case.dtype, case.dtype)
        )
        scores = [selftest.score(gate, tensors) for gate in (ours, *chosen)]
        for line in selftest.table(scores):
            click.echo(line)
        click.echo(
            f"{name}: "
            + "; ".join(
                f"{s.gate} lets {len({d for d, _ in s.survived})} of {len(selftest.DAMAGES)} "
                "damages live"
                for s in scores
            )
        )
        survivors += len(scores[0].survived)
    sys.exit(1 if survivors else 0)

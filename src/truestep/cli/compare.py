"""`truestep compare`: judge two files of tensors."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import end, finish, output_options


@click.command("compare")
@click.argument("actual", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Judge rel_l2 by this, not by the floor."
)
@click.option(
    "--weights/--activations",
    default=None,
    help="Judge as parameters (bits, exact rounding) or by a noise floor; default: by the names.",
)
@output_options
def command(
    actual: Path,
    reference: Path,
    tolerance: float | None,
    weights: bool | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Compare ACTUAL with REFERENCE: recordings, weights, safetensors, npy, npz, pt, latents.

    A folder of weights, or the index in it, is one side, however many files it has.
    """
    from truestep.judge.compare import compare

    result = compare(actual, reference, tolerance=tolerance, weights=weights)
    end(finish([result], json_path=json_path, report=report))

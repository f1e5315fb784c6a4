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
@output_options
def command(
    actual: Path,
    reference: Path,
    tolerance: float | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Compare ACTUAL with REFERENCE: recordings, safetensors, .npy, .npz, .pt, latent bundles."""
    from truestep import compare

    result = compare(actual, reference, tolerance=tolerance)
    end(finish([result], json_path=json_path, report=report))

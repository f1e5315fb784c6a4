"""`truestep weights`: was a checkpoint converted right?"""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import end, finish, output_options


@click.command("weights")
@click.argument("actual", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--rename",
    type=click.Path(path_type=Path),
    metavar="MAP.toml",
    help="Names of the actual side to names of the reference; else content and place tell.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Leave out names of either side (`model_ema.*`); the result says how many.",
)
@output_options
def command(
    actual: Path,
    reference: Path,
    rename: Path | None,
    ignore: tuple[str, ...],
    json_path: str | None,
    report: Path | None,
) -> None:
    """Was ACTUAL converted right from REFERENCE? Two checkpoints, under whatever names.

    Each is a file (.safetensors, .gguf, .pt), a folder of sharded weights, or the index in it. What
    is called otherwise, fused, split or laid out anew is paired by what it holds. Every parameter
    must be the other's bits, or its exact rounding; codes with a stored scale, and in blocks
    (GGUF), the nearest. No model is built, and tensors are read one after another.
    """
    from truestep.judge.weights import compare_weights
    from truestep.pairing import Pairing

    result = compare_weights(
        actual, reference, rename=Pairing.read(str(rename)) if rename else None, ignore=ignore
    )
    end(finish([result], json_path=json_path, report=report))

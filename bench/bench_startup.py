"""Start-up of the commands that must feel instant, as whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.common import emit, paired, rounded

BAR_S = 0.4


def main() -> None:
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest
    from truestep.recording.table import tensor_table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latent.safetensors"
        tensors = {"latent/final": torch.randn(1, 16, 5, 60, 104)}
        manifest = Manifest(
            tool_version="0", created="now", level="full", tensors=tensor_table(tensors)
        )
        Recording.in_memory(tensors, manifest).save(path)
        commands = {
            "truestep --help": ["--help"],
            "truestep show": ["show", str(path)],
            "python -c pass": None,
        }

        def runner(arguments: list[str] | None) -> None:
            code = ["-c", "pass"] if arguments is None else ["-m", "truestep", *arguments]
            subprocess.run([sys.executable, *code], check=True, capture_output=True)

        samples = paired(
            {name: lambda a=arguments: runner(a) for name, arguments in commands.items()},  # type: ignore[misc]
            rounds=9,
        )
    for name, seconds in samples.items():
        median = statistics.median(seconds)
        emit(
            "startup",
            command=name,
            median_s=round(median, 3),
            samples_s=rounded(seconds),
            bar_s=BAR_S,
            met=median < BAR_S,
        )


if __name__ == "__main__":
    main()

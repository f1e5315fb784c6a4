"""Everything that truestep says of an accelerator, measured on one, in at most eight minutes.

    python -m bench.accelerator [--device cuda|cpu] [--output FOLDER] [--seconds 480]
                                [--section NAME]

Transformers of the width of Wan 2.1 1.3B, FLUX.1 and Qwen-Image with 2 to 4 blocks, weights drawn
on the device; nothing is downloaded. Sections share the time: `floors` of harmless changes,
guidance `plans`, `overhead`, `memory`, `faults` and their harmless twins, and floors of what is
`compiled`. Each is written to `accelerator.json` and `accelerator.md` when it ends; one that raises
is said to have failed, and what there is no time for is said to be cut. With `--device cpu`
everything is tiny: that shows that the bench runs, and says nothing of an accelerator.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.accelerator.place import Here
from bench.accelerator.running import SECTIONS, run
from bench.accelerator.table import markdown
from bench.common import RESULTS, quiet
from truestep.environment import default_device, usable_device
from truestep.errors import UsageError


def main() -> int:
    """Run what is asked for; 1 where something failed."""
    options = _options()
    try:
        device = usable_device(options.device or default_device())
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    quiet()
    here = Here(device, real=device != "cpu")
    report = run(here, options.output, seconds=options.seconds, names=options.section)
    print(markdown(report))
    return int(any("failed" in each["status"] for each in report["sections"].values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accelerator", description="Measure truestep on an accelerator."
    )
    parser.add_argument(
        "--device", type=_device, help="cuda, cuda:1, cpu; default CUDA where there is one"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="default bench/results")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all sections together")
    parser.add_argument(
        "--section", action="append", default=[], choices=list(SECTIONS), help="may be repeated"
    )
    return parser.parse_args()


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cuda, cuda:NUMBER and cpu")
    return text


if __name__ == "__main__":
    raise SystemExit(main())

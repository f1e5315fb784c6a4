"""The change under test: `truestep check CASE --apply examples/parity/wan_port/port.py:use`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[3]))

from examples.parity.wan_port.convert import convert
from examples.parity.wan_port.model import Config, WanPort


def ported(model: Any) -> WanPort:
    """The port with the weights of a diffusers `WanTransformer3DModel`, in their dtypes."""
    with torch.device("meta"):
        port = WanPort(Config.of(model.config))
    port.load_state_dict(convert(model.state_dict()), strict=True, assign=True)
    return port.eval()


def use(pipeline: Any) -> None:
    """Put the port in the place of every transformer of a pipeline."""
    for name in ("transformer", "transformer_2"):
        model = getattr(pipeline, name)
        if model is not None:
            setattr(pipeline, name, ported(model))

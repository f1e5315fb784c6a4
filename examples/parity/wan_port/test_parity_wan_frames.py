"""Pipeline parity of wan on decoded frames: the port in the runtime against diffusers' pipeline.

Run it with `truestep parity run examples/parity/wan_port`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from truestep.parity import Loaded, Parity

sys.path.insert(0, str(Path(__file__).parents[3]))

from examples.parity.wan_port import pipelines


def load_official() -> Loaded:
    """diffusers' pipeline."""
    return pipelines.load_official("frames")


def load_port() -> Loaded:
    """truestep's runtime with the port in it."""
    return pipelines.load_port("frames")


PARITY = Parity(
    "wan",
    "pipeline-frames",
    kind="pipeline",
    coverage="both",
    official=load_official,
    port=load_port,
    inputs=pipelines.make_inputs,
    seeds=(0, 1),
    allow_shared=pipelines.SHARED,
)


@pytest.mark.parity(scope="pipeline-frames", coverage="both")
def test_parity_wan_frames(truestep: Any) -> None:
    truestep.check_parity(PARITY)

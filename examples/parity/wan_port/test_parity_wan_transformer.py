"""Parity of wan/transformer: the independent, fused port against diffusers' own class.

Both load the builtin digits model; the port reads the published file itself. Run it with
`truestep parity run examples/parity/wan_port`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.models import digits
from truestep.pairing import pair_modules
from truestep.parity import Family, Loaded, Parity
from truestep.parity.weights import load_state

sys.path.insert(0, str(Path(__file__).parents[3]))

FAMILY = Family("wan", weights_dir=digits.path() / "transformer")
PORT = "examples.parity.wan_port"


def load_official() -> Loaded:
    """diffusers' class through its own loader."""
    folder = FAMILY.weights("*.safetensors")[0].parent
    model = FAMILY.official_class("diffusers:WanTransformer3DModel").from_pretrained(folder)
    model.eval()
    return Loaded(
        lambda **inputs: model(**inputs, return_dict=False),
        module=model,
        weights=FAMILY.weights("*.safetensors"),
    )


def load_port() -> Loaded:
    """The port's class, with the published file's tensors laid out for it."""
    (path,) = FAMILY.weights("*.safetensors")
    config = FAMILY.port_class(f"{PORT}.model:Config")
    model = FAMILY.port_class(f"{PORT}.model:WanPort")(
        config.of(json.loads((path.parent / "config.json").read_text("utf-8")))
    )
    convert = FAMILY.port_class(f"{PORT}.convert:convert")
    model.load_state_dict(convert(load_state(path)), strict=True)
    model.eval()
    return Loaded(lambda **inputs: model(**inputs, return_dict=False), module=model, weights=[path])


def make_inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A noisy latent of 3 frames of 4x4, a timestep, and embeddings of eight words."""
    return {
        "hidden_states": torch.randn(1, 8, 3, 8, 8, generator=generator),
        "timestep": 1000 * torch.rand(1, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator),
    }


PARITY = Parity(
    "wan",
    "transformer",
    kind="dit",
    coverage="both",
    official=load_official,
    port=load_port,
    inputs=make_inputs,
)


@pytest.mark.parity(scope="transformer", coverage="both")
def test_parity_wan_transformer(truestep: Any) -> None:
    truestep.check_parity(PARITY)


def test_every_parameter_pairs_without_a_map() -> None:
    official, port = load_official().module, load_port().module
    assert official is not None
    assert port is not None
    pairing = pair_modules(port.state_dict(), official.state_dict())
    assert pairing.complete, pairing.table()
    assert not pairing.odd

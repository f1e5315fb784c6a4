"""Harmless twins: the same model computed in another way, as an optimisation or a port does."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truestep.recording.readers import load
from truestep.runtime.changes import math_kernel, thread_count
from truestep.runtime.precision import working_dtype
from truestep.testing.corpus.editing import around, denoiser, edit, source_of
from truestep.testing.corpus.entry import NotApplicable, twin
from truestep.testing.corpus.subjects import SUBJECTS

_ALL = tuple(SUBJECTS)
_UNCACHED = tuple(name for name in _ALL if name != "klein-kv")
"""Of the other, values are what the model gives, as a cache."""
_UNETS = ("sdxl", "inpaint", "controlnet", "img2img", "audioldm2", "svd")
_BATCHED = ("sdxl", "sd3", "inpaint", "img2img", "pixart", "sana", "mochi", "cogvideox-i2v")
_FLOW = ("flux", "kontext", "qwen", "z-image", "lumina2", "klein-kv")


def _models(pipe: Any) -> dict[str, nn.Module]:
    return {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}


def _modules(pipe: Any, kind: type | tuple[type, ...]) -> list[Any]:
    return [m for part in _models(pipe).values() for m in part.modules() if isinstance(m, kind)]


def _inside(pipe: Any, context: Callable[[], Any]) -> None:
    """Make every forward of the denoiser inside a context."""

    def change(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with context():
            return call(*args, **kwargs)

    around(denoiser(pipe), "forward", change)


@twin(*_ALL)
def math_attention(pipe: Any) -> None:
    """The denoiser's attention by the plain kernel."""
    _inside(pipe, math_kernel)


@twin(*_ALL)
def two_threads(pipe: Any) -> None:
    """The denoiser on two threads."""
    _inside(pipe, lambda: thread_count(2 if torch.get_num_threads() != 2 else 1))


@twin(*_ALL)
def attention_by_hand(pipe: Any) -> None:
    """The denoiser's attention as two products and a softmax."""
    _inside(pipe, _HandAttention)


class _HandAttention(torch.overrides.TorchFunctionMode):
    """Computes scaled dot product attention in plain steps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attended(*args, **(kwargs or {}))


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(repeats, -3) for part in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.float() * factor) @ key.float().transpose(-1, -2)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


@twin("sdxl", "sd3", "inpaint", "controlnet", "img2img", "flux", "audioldm2", "pixart")
def channels_last(pipe: Any) -> None:
    """Pictures are kept with the channels last."""
    for name in ("unet", "controlnet", "vae"):
        part = getattr(pipe, name, None)
        if part is not None:
            part.to(memory_format=torch.channels_last)


@twin("flux", "sd3", "inpaint", "controlnet", "img2img", "pixart", "hunyuan", "wan-i2v", "sana")
def fused_projections(pipe: Any) -> None:
    """Queries, keys and values by one product."""
    model = denoiser(pipe)
    if not hasattr(model, "fuse_qkv_projections"):
        raise NotApplicable(f"{type(model).__name__} does not fuse its projections")
    model.fuse_qkv_projections()


@twin(*_UNETS, "pixart", "sd3")
def attention_in_slices(pipe: Any) -> None:
    """The denoiser's attention head by head."""
    pipe.enable_attention_slicing(1)


@twin("sdxl", "inpaint", "controlnet", "img2img")
def plain_processors(pipe: Any) -> None:
    """The attention processors that were there before fused kernels."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.set_attn_processor(AttnProcessor())


@twin(*_ALL)
def decoder_in_slices(pipe: Any) -> None:
    """The decoder, one sample after another."""
    try:
        pipe.vae.enable_slicing()
    except (AttributeError, NotImplementedError) as error:
        raise NotApplicable(f"{type(pipe.vae).__name__} has no slices") from error


@twin(*_UNCACHED)
def values_scaled_by_two(pipe: Any) -> None:
    """A factor of four between an attention's values and its output: no bit changes."""
    _scale_values(pipe, 4.0)


@twin(*_UNCACHED)
def values_scaled_by_three(pipe: Any) -> None:
    """A factor of three between an attention's values and its output: roundings change."""
    if working_dtype(denoiser(pipe)) in (torch.bfloat16, torch.float16):
        raise NotApplicable("a third of a weight of 16 bits is another weight")
    _scale_values(pipe, 3.0)


def _scale_values(pipe: Any, factor: float) -> None:
    changed = 0
    for module in denoiser(pipe).modules():
        pairs = [
            (getattr(module, "to_v", None), getattr(module, "to_out", None)),
            (getattr(module, "add_v_proj", None), getattr(module, "to_add_out", None)),
        ]
        values, outputs = pairs[0]
        normed = getattr(module, "norm_v", None) is not None
        if not isinstance(values, nn.Linear) or outputs is None or normed:
            continue
        if _depends_on_size(module):
            continue
        for before, after in pairs:
            last = after[0] if isinstance(after, nn.ModuleList) else after
            _move_factor(before, last, factor)
        changed += 1
    if not changed:
        raise NotApplicable("no attention whose values could be scaled")


def _move_factor(before: Any, after: Any, factor: float) -> None:
    with torch.no_grad():
        for parameter in (getattr(before, "weight", None), getattr(before, "bias", None)):
            if parameter is not None:
                parameter.mul_(factor)
        if isinstance(after, nn.Linear):
            after.weight.div_(factor)


def _depends_on_size(module: nn.Module) -> bool:
    """Whether something between values and output depends on their size."""
    name = type(getattr(module, "processor", None)).__name__
    return any(part in name for part in ("Linear", "IP", "Gated"))


@twin(*_ALL)
def idle_hooks(pipe: Any) -> None:
    """Hooks on every module that hand on what they get."""
    for part in _models(pipe).values():
        for module in part.modules():
            module.register_forward_pre_hook(lambda module, args: args)
            module.register_forward_hook(lambda module, args, output: output)


@twin(*_ALL)
def copied(pipe: Any) -> Any:
    """A deep copy of the pipeline."""
    try:
        return copy.deepcopy(pipe)
    except RuntimeError as error:  # of torch's older weight norm
        raise NotApplicable(f"{type(pipe).__name__} cannot be copied") from error


@twin(*_ALL)
def forward_wrapped(pipe: Any) -> None:
    """The forward of every model is a function around the old one."""
    for part in _models(pipe).values():
        around(part, "forward", lambda call, *args, **kwargs: call(*args, **kwargs))


@twin(*_BATCHED)
def one_pass_after_another(pipe: Any) -> None:
    """The halves of a guided batch one after another."""
    around(denoiser(pipe), "forward", _halved)


def _halved(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    first = args[0] if args else kwargs["hidden_states"]
    count = first.shape[0]

    def part(value: Any, index: int) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == count:
            return value[index : index + 1]
        if isinstance(value, dict):
            return {k: part(v, index) for k, v in value.items()}
        return value

    results = [
        call(*(part(a, i) for a in args), **{k: part(v, i) for k, v in kwargs.items()})
        for i in range(count)
    ]
    return (torch.cat([result[0] for result in results]),)


@twin("flux", "kontext", "control", "sdxl", "sd3", "pixart", "qwen", "wan-i2v", "lumina2")
def row_of_a_batch(pipe: Any) -> None:
    """The prompt is encoded as the first of a batch of two."""
    for name, part in _models(pipe).items():
        if name.startswith("text_encoder"):
            around(part, "forward", _doubled)


def _doubled(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, torch.Tensor) else value

    output = call(*map(twice, args), **{k: twice(v) for k, v in kwargs.items()})
    for key, value in list(output.items()):
        if isinstance(value, torch.Tensor):
            output[key] = value[:1]
        elif isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value):
            output[key] = tuple(v[:1] for v in value)
    return output


@twin(*_ALL)
def norms_in_double(pipe: Any) -> None:
    """Norms with float64 inside."""
    norms = _modules(pipe, (nn.LayerNorm, nn.GroupNorm))
    if not norms:
        raise NotApplicable("no norms of torch")
    for norm in norms:
        around(norm, "forward", _norm_in_double(norm))


def _norm_in_double(norm: Any) -> Callable[..., Any]:
    def change(call: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        weight = None if norm.weight is None else norm.weight.double()
        bias = None if norm.bias is None else norm.bias.double()
        if isinstance(norm, nn.GroupNorm):
            y = nn.functional.group_norm(x.double(), norm.num_groups, weight, bias, norm.eps)
        else:
            shape = norm.normalized_shape
            y = nn.functional.layer_norm(x.double(), shape, weight, bias, norm.eps)
        return y.to(x.dtype)

    return change


@twin(*_ALL)
def stored_and_loaded(pipe: Any) -> None:
    """Weights are written to a file and read back."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        for name, part in _models(pipe).items():
            path = Path(folder) / f"{name}.safetensors"
            state = {k: v.detach().clone().contiguous() for k, v in part.state_dict().items()}
            save_file(state, path)
            part.load_state_dict({k: v.clone() for k, v in load(path, label=name).tensors.items()})


@twin(*_ALL)
def linear_as_product(pipe: Any) -> None:
    """Linear layers of the denoiser as a product and an addition."""
    for module in denoiser(pipe).modules():
        if type(module) is nn.Linear:
            around(module, "forward", _product(module))


def _product(layer: nn.Linear) -> Callable[..., Any]:
    def change(call: Callable[..., Any], x: torch.Tensor, *args: Any) -> torch.Tensor:
        y = torch.einsum("...i,oi->...o", x, layer.weight)
        return y if layer.bias is None else y + layer.bias

    return change


@twin(*_ALL)
def weights_transposed(pipe: Any) -> None:
    """Weights of linear layers lie transposed in memory."""
    for module in denoiser(pipe).modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


@twin(*_ALL)
def silu_by_hand(pipe: Any) -> None:
    """The sigmoid linear unit as a product."""
    units = _modules(pipe, nn.SiLU)
    if not units:
        raise NotApplicable("no such unit")
    for unit in units:
        around(unit, "forward", lambda call, x: x * torch.sigmoid(x.float()).to(x.dtype))


@twin(*_UNETS, "flux", "pixart")
def convolution_as_product(pipe: Any) -> None:
    """Kernels of one pixel as products over channels."""
    kernels = [m for m in _modules(pipe, nn.Conv2d) if m.kernel_size == (1, 1)]
    chosen = [m for m in kernels if m.stride == (1, 1) and m.groups == 1]
    if not chosen:
        raise NotApplicable("no kernel of one pixel")
    for module in chosen:
        around(module, "forward", _pixelwise(module))


def _pixelwise(layer: nn.Conv2d) -> Callable[..., Any]:
    def change(call: Callable[..., Any], x: torch.Tensor, *args: Any) -> torch.Tensor:
        y = nn.functional.linear(x.movedim(1, -1), layer.weight[:, :, 0, 0], layer.bias)
        return y.movedim(-1, 1)

    return change


@twin(*_ALL)
def scheduler_rebuilt(pipe: Any) -> None:
    """The scheduler is made anew of its own settings."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)


@twin(*_ALL)
def moved_to_double_and_back(pipe: Any) -> None:
    """Weights are made float64 and back again."""
    for part in _models(pipe).values():
        for parameter in part.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.double().to(parameter.dtype)


@twin(*_FLOW[:3], "lumina2")
def sigmas_otherwise(pipe: Any) -> None:
    """The noise levels by another formula of the same numbers."""
    old = "np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)"
    edit(pipe, "__call__", (old, "np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]"))


@twin("sdxl", "sd3", "inpaint", "controlnet", "img2img", "pixart", "sana", "mochi", "svd")
def guidance_regrouped(pipe: Any) -> None:
    """Guidance as a weighted sum of two passes."""
    source = source_of(pipe, "__call__")
    name = "cond" if "noise_pred_cond - noise_pred_uncond" in source else "text"
    for scale in ("self.guidance_scale", "guidance_scale"):
        old = f"noise_pred_uncond + {scale} * (noise_pred_{name} - noise_pred_uncond)"
        if old in source:
            new = f"(1 - {scale}) * noise_pred_uncond + {scale} * noise_pred_{name}"
            edit(pipe, "__call__", (old, new))
            return
    raise NotApplicable("guidance is written otherwise")


@twin("flux", "kontext", "fill", "control", "sd3", "z-image", "lumina2")
def scaled_by_inverse(pipe: Any) -> None:
    """Latents are multiplied by the inverse of the scaling factor."""
    old = "latents / self.vae.config.scaling_factor"
    edit(pipe, "__call__", (old, "latents * (1 / self.vae.config.scaling_factor)"))


@twin("flux", "kontext", "fill", "control", "qwen", "qwen-edit")
def packed_by_unfolding(pipe: Any) -> None:
    """Latents are packed by another operator in the same order."""

    def pack(latents: Any, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
        flat = latents.reshape(batch, channels, height, width)
        return nn.functional.pixel_unshuffle(flat, 2).flatten(2).transpose(1, 2).contiguous()

    pipe._pack_latents = pack


@twin("flux", "kontext", "fill", "control")
def ids_by_grid(pipe: Any) -> None:
    """Ids of positions by another function."""

    def ids(batch: int, height: int, width: int, device: Any, dtype: Any) -> torch.Tensor:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        table = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
        return table.reshape(-1, 3).to(device=device, dtype=dtype)

    pipe._prepare_latent_image_ids = ids


@twin(*_ALL)
def inference_mode(pipe: Any) -> None:
    """Models run without what gradients need."""
    _inside(pipe, torch.inference_mode)


@twin("wan-i2v", "vace", "flux", "sdxl", "controlnet", "audioldm2", "hunyuan", "qwen")
def accelerate_hooks(pipe: Any) -> None:
    """The hooks by which models are offloaded, which here do nothing."""
    try:
        from accelerate.hooks import (  # type: ignore[import-untyped]
            ModelHook,
            add_hook_to_module,
        )
    except ImportError as error:
        raise NotApplicable("accelerate is not installed") from error
    for part in _models(pipe).values():
        add_hook_to_module(part, ModelHook())

"""Find what an entry changes, and change it so that later dtype conversions keep working.

Nothing here keeps a weight or a dtype: hooks read both from the module when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bench.faults.entry import NotApplicable

__all__ = [
    "around",
    "attentions",
    "block_list",
    "blocks",
    "edm",
    "feed_forward",
    "linears",
    "middle",
    "middles",
    "models",
    "narrowed",
    "need",
    "on_call",
    "on_input",
    "on_output",
    "replace_forward",
    "residual",
    "self_attention",
    "shapes",
    "sinusoids",
    "streams",
    "temporal_factor",
    "with_attention",
]

Tensor = torch.Tensor


def need(condition: object, what: str) -> None:
    """Refuse a pipeline that lacks what the entry changes."""
    if not condition:
        raise NotApplicable(what)


def models(pipe: Any) -> list[Any]:
    """Every denoiser of a pipeline: both experts of a two-expert model."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in found if model is not None]


def block_list(model: Any) -> Any:
    """The list of a transformer's blocks, where it has one."""
    found = getattr(model, "blocks", getattr(model, "transformer_blocks", None))
    need(isinstance(found, nn.ModuleList), "the model has no transformer blocks")
    return found


def blocks(pipe: Any) -> Iterator[Any]:
    """Every transformer block of every expert."""
    for model in models(pipe):
        yield from block_list(model)


def feed_forward(block: Any) -> Any:
    """A transformer block's feed-forward."""
    found = getattr(block, "ffn", getattr(block, "ff", None))
    need(found is not None, "the block has no feed-forward")
    return found


def edm(pipe: Any) -> bool:
    """Whether the schedule is that of Karras et al., as in Cosmos, and not a flow's."""
    return hasattr(pipe.scheduler, "precondition_noise")


def temporal_factor(pipe: Any) -> int:
    """Frames that a latent frame after the first one stands for."""
    config = pipe.vae.config
    found: int = config.get("scale_factor_temporal", config.get("temporal_compression_ratio"))
    return found


def middle(model: nn.Module) -> Any:
    """The block in the middle: of a transformer's list, or of a UNet's way down.

    Not a UNet's lowest: on the terrain model its attention moves the output by 1e-7.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("blocks", "transformer_blocks", "down_blocks"):
            found: Any = module
            return found[len(found) // 2]
    raise NotApplicable("the model has no list of blocks")


def residual(model: nn.Module) -> Any:
    """What adds to one tensor and returns it: the middle block, or in a UNet its last resnet."""
    block = middle(model)
    return block.resnets[-1] if hasattr(block, "resnets") else block


def sinusoids(model: nn.Module) -> list[Any]:
    """Modules that turn a timestep into sines and cosines; at least one."""
    found = [module for module in model.modules() if "flip_sin_to_cos" in vars(module)]
    need(found, "no sinusoidal embedding")
    return found


def middles(pipe: Any) -> list[Any]:
    """The middle block of every expert."""
    return [middle(model) for model in models(pipe)]


def linears(module: nn.Module) -> list[nn.Linear]:
    """Linear layers, in the order of their names; at least one."""
    found = [part for part in module.modules() if isinstance(part, nn.Linear)]
    need(found, "no linear layer")
    return found


def attentions(module: nn.Module) -> list[Any]:
    """Attention modules: whatever has separate projections for query, key and value."""
    found = [part for part in module.modules() if hasattr(part, "to_q") and hasattr(part, "to_v")]
    need(found, "no attention")
    return found


def self_attention(module: nn.Module) -> Any:
    """The first attention of a block; in Wan its self-attention."""
    return attentions(module)[0]


def around(pipe: Any, stage: str, change: Callable[..., Any]) -> None:
    """Replace a stage by `change(original, pipe, *arguments)`."""
    original = getattr(pipe, stage)

    def changed(inner: Any, *args: Any) -> Any:
        return change(original, inner, *args)

    setattr(pipe, stage, changed)


def on_output(module: nn.Module, change: Callable[[Any, tuple[Any, ...], Any], Any]) -> None:
    """Pass a module's output through `change(module, arguments, output)`."""
    module.register_forward_hook(change)


def on_input(module: nn.Module, change: Callable[[Any, tuple[Any, ...]], Any]) -> None:
    """Pass a module's positional arguments through `change(module, arguments)`."""
    module.register_forward_pre_hook(change)


def replace_forward(module: Any, change: Callable[..., Any]) -> None:
    """Replace a forward by `change(module, original, *arguments)`."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return change(module, original, *args, **kwargs)

    module.forward = forward


def on_call(module: nn.Module, change: Callable[..., Any]) -> None:
    """Pass a module's output through `change(module, arguments, keywords, output)`."""
    module.register_forward_hook(change, with_kwargs=True)


def streams(args: tuple[Any, ...], keywords: Any) -> Any:
    """What a block was given to add to: its first argument; of LTX-2's, video and sound."""
    return args[0] if args else (keywords["hidden_states"], keywords["audio_hidden_states"])


def shapes(value: Any) -> list[torch.Size]:
    """The shapes of a tensor's or a tuple's parts."""
    return [part.shape for part in (value if isinstance(value, tuple) else (value,))]


def narrowed(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or all of a tuple, rounded through a narrower dtype, in its own."""
    if isinstance(value, tuple):
        parts = [narrowed(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.to(dtype).to(value.dtype)


class _Attention(TorchFunctionMode):
    """Answers calls of scaled dot product attention with another function."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def with_attention(module: nn.Module, attend: Callable[..., Tensor]) -> None:
    """Compute scaled dot product attention inside a module's forward with `attend`.

    `attend` has the signature of `torch.nn.functional.scaled_dot_product_attention`.
    """

    def forward(_: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Attention(attend):
            return original(*args, **kwargs)

    replace_forward(module, forward)

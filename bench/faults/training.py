"""A trainer of a tiny transformer, faults of it, most of them of its backward alone, and harmless
twins.

The trainer is one step of flow matching as diffusers' training scripts make it: noise, a timestep a
sample, a weighted loss, two micro-batches, clipping, AdamW, EMA; whole, or of a LoRA.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from truestep import TrainingStep

Tensor = torch.Tensor
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


@dataclass
class Trainer:
    """What a step is made of; a fault changes one of it.

    Attributes:
        model: A tiny Flux transformer, with a LoRA if so.
        batches: Micro-batches.
        clip: Clips gradients. optimizer: made of parameters. around: what the step runs in.
    """

    model: torch.nn.Module
    batches: list[dict[str, Tensor]]
    ema: torch.nn.Module
    decay: float = 0.99
    clip: Callable[[list[Tensor]], Any] = field(
        default=partial(torch.nn.utils.clip_grad_norm_, max_norm=0.02)
    )
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = field(
        default=partial(torch.optim.AdamW, lr=1e-4, weight_decay=1e-2)
    )
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = field(default=lambda *a: weighted(*a))
    backward: Callable[[list[Callable[[], Tensor]]], Tensor] = field(
        default=lambda losses: accumulated(losses)
    )
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    merge: Callable[[torch.nn.Module], torch.nn.Module] | None = None

    def predicted(self, batch: dict[str, Tensor]) -> Tensor:
        """What the model says of a noisy latent."""
        sigma = (batch["timestep"] / 1000).view(-1, 1, 1)
        noisy = (1 - sigma) * batch["latent"] + sigma * batch["noise"]
        made: Tensor = self.model(
            hidden_states=noisy,
            encoder_hidden_states=batch["text"],
            pooled_projections=batch["pooled"],
            timestep=batch["timestep"] / 1000,
            img_ids=batch["img_ids"],
            txt_ids=batch["txt_ids"],
            return_dict=False,
        )[0]
        return made

    def one_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of one micro-batch."""
        target = batch["noise"] - batch["latent"]
        return self.loss(self.predicted(batch), target, batch["timestep"])

    def step(self) -> TrainingStep:
        """The step that truestep records and checks."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = self.optimizer(trained)

        def run() -> Tensor:
            with self.around():
                total = self.backward([partial(self.one_loss, b) for b in self.batches])
            self.clip(trained)
            optimizer.step()
            with torch.no_grad():
                for own, new in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                    own.mul_(self.decay).add_(new, alpha=1 - self.decay)
            return total

        merge = partial(self.merge, self.model) if self.merge else None
        return TrainingStep(
            model=self.model, run=run, optimizer=optimizer, ema=self.ema, merge=merge
        )


def weighted(predicted: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    """Squared error, weighted by timestep."""
    return (_weight(timestep) * (predicted - target).square()).mean()


def _weight(timestep: Tensor) -> Tensor:
    return (1 + timestep / 1000).view(-1, 1, 1)


def accumulated(losses: list[Callable[[], Tensor]]) -> Tensor:
    """Gradients of all micro-batches, added."""
    total = torch.zeros(())
    for loss in losses:
        value = loss() / len(losses)
        value.backward()
        total = total + value.detach()
    return total


def trainer(*, lora: bool = False, dropout: float = 0.0) -> Trainer:
    """The trusted one, made anew."""
    from truestep.testing import tiny

    model = tiny.pipeline("FluxPipeline").transformer.train()
    if lora:
        from peft import LoraConfig

        torch.manual_seed(3)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and dropout:
            module.p = dropout
    ema = copy.deepcopy(model)
    for number, parameter in enumerate(ema.parameters()):
        parameter.data.add_(0.01 * (-1) ** number)
    merge = _fused if lora else None
    return Trainer(model, [_batch(model, seed) for seed in (1, 2)], ema, merge=merge)


def _batch(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    draw = partial(torch.randn, generator=generator)
    side = torch.arange(4)
    ids = torch.stack([torch.zeros(16), side.repeat_interleave(4), side.repeat(4)], dim=1)
    return {
        "latent": draw(2, 16, config.in_channels),
        "noise": draw(2, 16, config.in_channels),
        "text": draw(2, 6, config.joint_attention_dim),
        "pooled": draw(2, config.pooled_projection_dim),
        "timestep": 1000 * torch.rand(2, generator=generator),
        "img_ids": ids.float(),
        "txt_ids": torch.zeros(6, 3),
    }


def _fused(model: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    merged: Any = copy.deepcopy(model)
    merged.fuse_lora(lora_scale=scale)
    return merged  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Planted:
    """A fault or a twin.

    Attributes:
        name: Its own.
        apply: Changes a trainer.
        subject: `whole`, `dropout` or `lora`.
        stage: Where it has to be named; empty: it is harmless.
        module: The module, if it is in one.
        word: Something of the words that have to be said.
        backward: Whether the gradient alone is wrong: the loss and every forward stay right.
    """

    name: str
    apply: Callable[[Trainer], None]
    subject: str = "whole"
    stage: str = ""
    module: str = ""
    word: str = ""
    backward: bool = False


SUBJECTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "dropout": {"dropout": 0.2},
    "lora": {"lora": True},
}


def build(entry: Planted | None, subject: str) -> TrainingStep:
    """A step with a fault, or the trusted one."""
    made = trainer(**SUBJECTS[subject])
    if entry is not None:
        entry.apply(made)
    return made.step()


def _at(made: Trainer, fqn: str) -> Any:
    return made.model.get_submodule(fqn)


def _forward(
    fqn: str, change: Callable[[Any, Any], Callable[..., Any]]
) -> Callable[[Trainer], None]:
    """Exchange a module's forward."""

    def apply(made: Trainer) -> None:
        module = _at(made, fqn)
        module.forward = change(module, module.forward)

    return apply


class RMSNormFunction(torch.autograd.Function):
    """RMS norm; `full`: with the gradient of the mean square, as it has to be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, full: bool) -> Tensor:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, root)
        ctx.full = full
        return x * root * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        inner = gradient * weight
        given = inner * root
        if ctx.full:
            given = given - x * root**3 * (inner * x).mean(-1, keepdim=True)
        return given, (gradient * x * root).flatten(0, -2).sum(0), None, None


class GeluFunction(torch.autograd.Function):
    """The tanh approximation of GELU; `exact`: with the derivative of another, the exact one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = "none" if exact else "tanh"
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        made = torch.ops.aten.gelu_backward(gradient, x, approximate=ctx.approximate)
        return made, None


class LinearFunction(torch.autograd.Function):
    """A linear layer whose backward scales or forgets something."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: float, forgets: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.forgets = scale, forgets
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        bias = None if ctx.forgets else flat.sum(0)
        own = ctx.scale * (flat.T @ x.flatten(0, -2))
        return gradient @ weight, own, bias, None, None


class StraightSilu(torch.autograd.Function):
    """SiLU that hands its gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class UnscaledAttention(torch.autograd.Function):
    """Attention whose backward forgets the scale of the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        inner = gradient @ v.mT
        scores = weights * (inner - (inner * weights).sum(-1, keepdim=True))
        return scores @ k, scores.mT @ q, weights.mT @ gradient


class TurnedOn(torch.autograd.Function):
    """A rotation whose backward turns on where it has to turn back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(gradient, *ctx.saved_tensors), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[None, :, None], sin[None, :, None]
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Processor:
    """Flux's attention, written out.

    Args:
        attend: Attention of `b h s d`. turn: the rotation. detached: whether keys are cut off.
    """

    def __init__(
        self,
        attend: Callable[..., Tensor] = _attended,
        turn: Callable[..., Tensor] = _turned,
        detached: bool = False,
    ) -> None:
        self.attend, self.turn, self.detached = attend, turn, detached

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(layer: Any, x: Tensor) -> Tensor:
            made: Tensor = layer(x).unflatten(-1, (-1, attn.head_dim))
            return made

        q = attn.norm_q(heads(attn.to_q, hidden_states))
        k = attn.norm_k(heads(attn.to_k, hidden_states))
        v = heads(attn.to_v, hidden_states)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            more = encoder_hidden_states
            q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj, more)), q], 1)
            k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj, more)), k], 1)
            v = torch.cat([heads(attn.add_v_proj, more), v], 1)
        q, k = (self.turn(x, *image_rotary_emb) for x in (q, k))
        k = k.detach() if self.detached else k
        made = self.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return made
        picture = attn.to_out[1](attn.to_out[0](made[:, text:]))
        return picture, attn.to_add_out(made[:, :text])


def _processor(fqn: str, **options: Any) -> Callable[[Trainer], None]:
    def apply(made: Trainer) -> None:
        _at(made, fqn).processor = Processor(**options)

    return apply


def _rms(full: bool) -> Callable[[Trainer], None]:
    return _forward(
        f"{BLOCK}.attn.norm_q",
        lambda m, own: lambda x: RMSNormFunction.apply(x, m.weight, m.eps, full),
    )


def _gelu(exact: bool) -> Callable[[Trainer], None]:
    return _forward(
        f"{BLOCK}.ff.net.0", lambda m, own: lambda x: GeluFunction.apply(m.proj(x), exact)
    )


def _linear(fqn: str, scale: float, forgets: bool) -> Callable[[Trainer], None]:
    return _forward(
        fqn, lambda m, own: lambda x: LinearFunction.apply(x, m.weight, m.bias, scale, forgets)
    )


def _gate_detached(m: Any, own: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        made = list(own(*args, **kwargs))
        made[1] = made[1].detach()
        return tuple(made)

    return forward


def _given_detached(m: Any, own: Any) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        return own(hidden_states=hidden_states.detach(), **kwargs)

    return forward


def _doubled(m: Any, own: Any) -> Callable[..., Any]:
    def forward(x: Tensor) -> Tensor:
        made: Tensor = own(x)
        return 2 * made - made.detach()

    return forward


def _clamped(made: Trainer) -> None:
    def clamp(module: Any, args: Any, output: Tensor) -> None:
        limit = 1e-3
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(-limit, limit))

    _at(made, "proj_out").register_forward_hook(clamp)


def _checkpointing(**options: Any) -> Callable[[Trainer], None]:
    def apply(made: Trainer) -> None:
        made.model.enable_gradient_checkpointing(
            partial(torch.utils.checkpoint.checkpoint, **options)
        )

    return apply


def _freeze(name: str) -> Callable[[Trainer], None]:
    def apply(made: Trainer) -> None:
        made.model.get_parameter(name).requires_grad_(False)

    return apply


def _lora_scale(made: Trainer) -> None:
    _at(made, f"{BLOCK}.attn.to_q").scaling["default"] *= 2


def _set(**fields: Any) -> Callable[[Trainer], None]:
    def apply(made: Trainer) -> None:
        for name, value in fields.items():
            setattr(made, name, value)

    return apply


def _undivided(losses: list[Callable[[], Tensor]]) -> Tensor:
    total = torch.zeros(())
    for loss in losses:
        value = loss()
        value.backward()
        total = total + value.detach() / len(losses)
    return total


def _together(losses: list[Callable[[], Tensor]]) -> Tensor:
    value = torch.stack([loss() / len(losses) for loss in losses]).sum()
    value.backward()
    return value.detach()


def _forgetting(made: Trainer) -> None:
    def backward(losses: list[Callable[[], Tensor]]) -> Tensor:
        total = torch.zeros(())
        for loss in losses:
            made.model.zero_grad()
            value = loss() / len(losses)
            value.backward()
            total = total + value.detach()
        return total

    made.backward = backward


def _gradient_unweighted(predicted: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    plain = (predicted - target).square().mean()
    return plain + (weighted(predicted, target, timestep) - plain).detach()


def _in_bfloat16(predicted: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    return weighted(predicted.bfloat16().float(), target, timestep)


def _of_epsilon(predicted: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    return weighted(predicted, -target, timestep)


def _mse(predicted: Tensor, target: Tensor, timestep: Tensor) -> Tensor:
    each = F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)
    return (each * _weight(timestep).flatten()).mean()


def _clip_each(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        torch.nn.utils.clip_grad_norm_([parameter], 0.02)


def _clip_by_hand(parameters: list[Tensor]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    for gradient in gradients:
        gradient.mul_((0.02 / (norm + 1e-6)).clamp(max=1.0))


class HandAdam(torch.optim.Optimizer):
    """AdamW, written out; `corrected`: with its bias correction."""

    def __init__(self, params: Any, corrected: bool) -> None:
        super().__init__(params, {"lr": 1e-4})
        self.corrected = corrected

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(t=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
            state["t"] += 1
            state["m"].lerp_(parameter.grad, 0.1)
            state["v"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            first = 1 - 0.9 ** state["t"] if self.corrected else 1.0
            second = 1 - 0.999 ** state["t"] if self.corrected else 1.0
            parameter.mul_(1 - 1e-4 * 1e-2)
            root = (state["v"] / second).sqrt() + 1e-8
            parameter.sub_(1e-4 * (state["m"] / first) / root)


def _merged_by_hand(model: torch.nn.Module) -> torch.nn.Module:
    merged: Any = copy.deepcopy(model)
    for module in merged.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            module.base_layer.weight.data += module.scaling["default"] * (b @ a)
            b.data.zero_()
    return merged  # type: ignore[no-any-return]


def _two_threads(made: Trainer) -> None:
    from truestep.runtime.changes import thread_count

    made.around = partial(thread_count, 2)


def _math(made: Trainer) -> None:
    from truestep.runtime.changes import math_kernel

    made.around = math_kernel


def _compiled(made: Trainer) -> None:
    made.model.compile(backend="aot_eager")


def _adam(kind: Any = torch.optim.AdamW, **options: Any) -> Callable[[Trainer], None]:
    known = {"lr": 1e-4, "weight_decay": 1e-2}
    return _set(optimizer=partial(kind, **{**known, **options}))


def _in_module(
    name: str, apply: Callable[[Trainer], None], module: str, word: str = "", **more: Any
) -> Planted:
    return Planted(name, apply, stage="backward", module=module, word=word, backward=True, **more)


FAULTS = (
    _in_module("norm-mean-term", _rms(False), f"{BLOCK}.attn.norm_q", "RMSNormFunction"),
    _in_module("gelu-derivative", _gelu(True), f"{BLOCK}.ff.net.0", "GeluFunction"),
    _in_module(
        "weight-gradient-halved",
        _linear(f"{BLOCK}.attn.to_v", 0.5, False),
        f"{BLOCK}.attn.to_v",
        "0.5",
    ),
    _in_module(
        "bias-gradient-lost",
        _linear(f"{BLOCK}.ff.net.2", 1.0, True),
        f"{BLOCK}.ff.net.2",
        "no gradient",
    ),
    _in_module(
        "attention-unscaled",
        _processor(f"{SINGLE}.attn", attend=UnscaledAttention.apply),
        f"{SINGLE}.attn",
        "UnscaledAttention",
    ),
    _in_module("key-detached", _processor(f"{BLOCK}.attn", detached=True), f"{BLOCK}.attn"),
    _in_module(
        "rotation-forward",
        _processor(f"{BLOCK}.attn", turn=TurnedOn.apply),
        f"{BLOCK}.attn",
        "TurnedOn",
    ),
    _in_module("gate-detached", _forward(f"{BLOCK}.norm1", _gate_detached), f"{BLOCK}.norm1"),
    _in_module("block-detached", _forward(BLOCK, _given_detached), BLOCK, "no gradient"),
    _in_module(
        "silu-straight-through",
        _forward("time_text_embed.timestep_embedder.act", lambda m, own: StraightSilu.apply),
        "time_text_embed.timestep_embedder.act",
        "StraightSilu",
    ),
    _in_module("gradient-clamped", _clamped, "proj_out"),
    _in_module("parameter-frozen", _freeze("norm_out.linear.weight"), "norm_out.linear", "frozen"),
    _in_module("lora-alpha", _lora_scale, f"{BLOCK}.attn.to_q", "scaled by 2", subject="lora"),
    _in_module(
        "lora-frozen",
        _freeze(f"{BLOCK}.attn.to_k.lora_B.default.weight"),
        f"{BLOCK}.attn.to_k.lora_B.default",
        "frozen",
        subject="lora",
    ),
    _in_module(
        "text-detached",
        _forward("context_embedder", lambda m, own: lambda x: own(x).detach()),
        "context_embedder",
        "no gradient",
    ),
    _in_module(
        "gradient-doubled",
        _forward(f"{SINGLE}.proj_mlp", _doubled),
        f"{SINGLE}.proj_mlp",
        "scaled by 2",
    ),
    Planted(
        "checkpoint-forgets-random",
        _checkpointing(use_reentrant=False, preserve_rng_state=False),
        "dropout",
        "backward",
        "(root)",
        "checkpointing",
        True,
    ),
    Planted(
        "accumulation-undivided",
        _set(backward=_undivided),
        "whole",
        "loss",
        "",
        "scaled by 2",
        True,
    ),
    Planted("gradient-unweighted", _set(loss=_gradient_unweighted), "whole", "loss", "", "", True),
    Planted("micro-batch-forgotten", _forgetting, "whole", "gradient", "", "not added", True),
    Planted("loss-in-bfloat16", _set(loss=_in_bfloat16), "whole", "loss"),
    Planted("target-of-other-sign", _set(loss=_of_epsilon), "whole", "loss"),
    Planted("clip-each", _set(clip=_clip_each), "whole", "optimizer", "", "clipping"),
    Planted(
        "clip-forgotten", _set(clip=lambda parameters: None), "whole", "optimizer", "", "clipping"
    ),
    Planted("adam-betas", _adam(betas=(0.9, 0.95)), "whole", "optimizer", "", "betas (0.9, 0.95)"),
    Planted("adam-epsilon", _adam(eps=1e-6), "whole", "optimizer", "", "eps 1e-06"),
    Planted(
        "adam-coupled",
        _adam(torch.optim.Adam),
        "whole",
        "optimizer",
        "",
        "optimizer Adam (was AdamW)",
    ),
    Planted(
        "adam-uncorrected",
        _set(optimizer=partial(HandAdam, corrected=False)),
        "whole",
        "optimizer",
        "",
        "no bias correction",
    ),
    Planted("ema-decay", _set(decay=0.999), "whole", "optimizer", "", "decay"),
    Planted("merge-scale", _set(merge=partial(_fused, scale=0.5)), "lora", "merge", "", ""),
)

TWINS = (
    Planted("the-same-whole", lambda made: None),
    Planted("the-same-dropout", lambda made: None, "dropout"),
    Planted("the-same-lora", lambda made: None, "lora"),
    Planted("two-threads", _two_threads),
    Planted("math-attention", _math),
    Planted("attention-written-out", _processor(f"{BLOCK}.attn")),
    Planted("checkpointing", _checkpointing(use_reentrant=False)),
    Planted("checkpointing-dropout", _checkpointing(use_reentrant=False), "dropout"),
    Planted("checkpointing-reentrant", _checkpointing(use_reentrant=True)),
    Planted("norm-function", _rms(True)),
    Planted("gelu-function", _gelu(False)),
    Planted("linear-function", _linear(f"{BLOCK}.attn.to_v", 1.0, False)),
    Planted("loss-written-otherwise", _set(loss=_mse)),
    Planted("one-backward", _set(backward=_together)),
    Planted("clip-by-hand", _set(clip=_clip_by_hand)),
    Planted("adam-fused", _adam(fused=True)),
    Planted("adam-foreach", _adam(foreach=True)),
    Planted("adam-by-hand", _set(optimizer=partial(HandAdam, corrected=True))),
    Planted("merge-by-hand", _set(merge=_merged_by_hand), "lora"),
    Planted("compiled", _compiled),
)


def entries() -> Iterator[Planted]:
    """All of it."""
    yield from FAULTS
    yield from TWINS

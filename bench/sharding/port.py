"""Wan on several ranks of torch.distributed, sharded in the ways that engines do, by plain torch.

    torchrun --nproc-per-node 2 port.py FOLDER CASE [CASE ...]

Each CASE is one generation, `KIND/FAULT/INPUTS/DTYPE`: FAULT `none` is right, INPUTS is a file of
FOLDER without its suffix, DTYPE `float32` or `bfloat16`.

=============  =====================================================================================
ulysses        tokens split, heads exchanged by all-to-all for attention; padded where uneven
gathered       tokens split, keys and values gathered; shares of other lengths where uneven
ring           tokens split, keys and values sent around a ring, softmax online; padded where uneven
zigzag         as `ring`, each rank holding a piece from the front and one from the back
tensor         columns and rows of the weights split, partial sums reduced
guidance       a branch of the guidance on each half of the ranks
mixed          a branch on each half, tokens split within the halves as `ulysses`
frames         latents split by frames, denoised and stepped in shares, gathered at the end
reversed       as `gathered`, the last rank holding the first tokens
library        diffusers' own context parallelism, by Ulysses
=============  =====================================================================================
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

STEPS, SCALE, SHIFT = 2, 5.0, 3.0


class Euler:
    """Flow matching, stepped by Euler."""

    def set_timesteps(self, steps: int) -> None:
        least = shifted(torch.tensor(1.0 / 1000))
        self.sigmas = shifted(torch.linspace(1.0, float(least), steps))
        self.timesteps = self.sigmas * 1000

    def step(self, velocity: Tensor, number: int, latent: Tensor) -> Tensor:
        after = [*self.sigmas[1:], torch.tensor(0.0)]
        return latent + (after[number] - self.sigmas[number]) * velocity


def shifted(sigma: Tensor) -> Tensor:
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


@dataclass
class Plan:
    """Who holds what: the group that shares tokens or channels, and this rank's place in it."""

    kind: str
    fault: str
    group: Any
    size: int
    rank: int
    length: int = 0
    frames: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    @property
    def share(self) -> int:
        return -(-self.length // self.size)

    def sizes(self) -> list[int]:
        """Tokens of each rank, of a split without padding."""
        return [len(part) for part in torch.arange(self.length).tensor_split(self.size)]

    def place(self) -> int:
        return self.size - 1 - self.rank if self.kind == "reversed" else self.rank

    def take(self, value: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens."""
        if self.kind in ("gathered", "reversed"):
            sizes = self.sizes()
            start = sum(sizes[: self.place()])
            if self.fault == "off-by-one" and self.rank:
                start -= 1
            return value.narrow(dim, start, sizes[self.place()]).contiguous()
        if self.kind == "zigzag":
            pieces = padded(value, dim, 2 * self.size * -(-self.length // (2 * self.size)))
            many = pieces.chunk(2 * self.size, dim)
            return torch.cat([many[self.rank], many[2 * self.size - 1 - self.rank]], dim)
        return padded(value, dim, self.share * self.size).chunk(self.size, dim)[self.rank].clone()

    def kept(self) -> Tensor:
        """Which of this rank's tokens are no padding."""
        known = torch.ones(1, self.length, 1)
        return self.take(known, 1)[0, :, 0] > 0

    def gather(self, value: Tensor) -> Tensor:
        """All tokens in order, padding removed."""
        if self.kind in ("gathered", "reversed"):
            sizes = self.sizes()
            sizes = sizes[::-1] if self.kind == "reversed" else sizes
            parts = [value.new_empty(value.shape[0], size, *value.shape[2:]) for size in sizes]
            uneven(parts, value, self)
            parts = parts[::-1] if self.kind == "reversed" else parts
        else:
            parts = [torch.zeros_like(value) for _ in range(self.size)]
            if self.fault != "not-gathered":
                dist.all_gather(parts, value.contiguous(), group=self.group)  # at: tokens
        if self.fault == "order":
            parts = parts[::-1]
        if self.kind == "zigzag":
            halves = [part.chunk(2, 1) for part in parts]
            parts = [one[0] for one in halves] + [one[1] for one in reversed(halves)]
        whole = torch.cat(parts, 1)
        if self.fault == "front":  # the padding is taken from the front
            return whole[:, whole.shape[1] - self.length :]
        return whole[:, : self.length]


def uneven(parts: list[Tensor], value: Tensor, plan: Plan) -> None:
    """Gather shares of other lengths: gloo takes them of one size, so the longest is sent."""
    most = max(part.shape[1] for part in parts)
    made = [value.new_empty(value.shape[0], most, *value.shape[2:]) for _ in parts]
    dist.all_gather(made, padded(value, 1, most).contiguous(), group=plan.group)  # at: shares
    for part, one in zip(parts, made, strict=True):
        part.copy_(one[:, : part.shape[1]])


def padded(value: Tensor, dim: int, length: int) -> Tensor:
    more = length - value.shape[dim]
    if not more:
        return value
    shape = list(value.shape)
    shape[dim] = more
    return torch.cat([value, value.new_zeros(shape)], dim)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `b s h d`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attention:
    """A processor: the projections as they are, attention over all ranks."""

    def __init__(self, plan: Plan, block: int) -> None:
        self.plan, self.block = plan, block

    def __call__(self, attn: Any, hidden: Tensor, text: Any, mask: Any, rope: Any) -> Tensor:
        plan, itself = self.plan, text is None
        given = hidden if text is None else text
        q, k, v = attn.to_q(hidden), attn.to_k(given), attn.to_v(given)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rope is not None:
            q, k = rotated(q, *rope), rotated(k, *rope)
        if itself and plan.kind in ("ulysses", "mixed"):
            made = ulysses(q, k, v, plan)
        elif itself and plan.kind in ("ring", "zigzag"):
            made = ring(q, k, v, plan)
        elif itself and plan.kind in ("gathered", "reversed", "frames"):
            made = gathered(q, k, v, plan, self.block)
        else:
            made = attend(q, k, v)
        return attn.to_out[1](attn.to_out[0](made.flatten(2, 3).type_as(hidden)))


def to_heads(x: Tensor, plan: Plan) -> Tensor:
    """`b s/p h d` to `b s h/p d`."""
    b, s, h, d = x.shape
    given = x.reshape(b, s, plan.size, h // plan.size, d).permute(2, 1, 0, 3, 4).contiguous()
    made = torch.empty_like(given)
    dist.all_to_all_single(made, given, group=plan.group)  # at: heads
    return made.flatten(0, 1).permute(1, 0, 2, 3)


def to_tokens(x: Tensor, plan: Plan) -> Tensor:
    """`b s h/p d` to `b s/p h d`."""
    b, s, h, d = x.shape
    given = x.reshape(b, plan.size, s // plan.size, h, d).permute(1, 3, 0, 2, 4).contiguous()
    if plan.fault == "axis":  # cut along another axis than the tokens
        given = x.reshape(b, s // plan.size, plan.size, h, d).permute(2, 3, 0, 1, 4).contiguous()
    made = torch.empty_like(given)
    dist.all_to_all_single(made, given, group=plan.group)  # at: back
    if plan.fault == "head-order":
        return made.permute(2, 3, 1, 0, 4).flatten(2, 3)
    return made.flatten(0, 1).permute(1, 2, 0, 3)


def ulysses(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    q, k = to_heads(q, plan), to_heads(k, plan)
    if plan.fault == "values":  # as though these were split by tokens already
        b, s, h, d = v.shape
        given = v.reshape(b, plan.size, s // plan.size, h, d).transpose(0, 1).contiguous()
        made = torch.empty_like(given)
        dist.all_to_all_single(made, given, group=plan.group)  # at: values
        v = made.reshape(b, s * plan.size, h // plan.size, d)
    else:
        v = to_heads(v, plan)
    keep = k.shape[1] if plan.fault == "unmasked" else plan.length
    return to_tokens(attend(q, k[:, :keep], v[:, :keep]), plan)


def gathered(q: Tensor, k: Tensor, v: Tensor, plan: Plan, block: int) -> Tensor:
    if plan.kind == "frames":
        many = [torch.empty_like(x) for x in (k, v) for _ in range(plan.size)]
        keys, values = many[: plan.size], many[plan.size :]
        dist.all_gather(keys, k.contiguous(), group=plan.group)  # at: keys
        dist.all_gather(values, v.contiguous(), group=plan.group)  # at: vals
        k, v = torch.cat(keys, 1)[:, : plan.length], torch.cat(values, 1)[:, : plan.length]
    else:
        k = plan.gather(k)
        if plan.fault == "values-order":  # another order than the keys'
            mine = [torch.empty_like(v) for _ in range(plan.size)]
            dist.all_gather(mine, v.contiguous(), group=plan.group)  # at: turned
            v = torch.cat(mine[::-1], 1)
        else:
            v = plan.gather(v)
    if plan.fault == "stale":  # keys of the step before
        k, plan.memory[f"{block} {plan.frames}"] = (
            plan.memory.get(f"{block} {plan.frames}", k) if plan.step else k,
            k,
        )
    return attend(q, k, v)


def ring(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention over keys and values that go around, by softmax online."""
    scale = q.shape[-1] ** -0.5
    keep = plan.kept()
    if plan.fault == "unmasked":
        keep = torch.ones_like(keep)
    total = top = weight = None
    for turn in range(plan.size):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
        scores = scores.masked_fill(~keep[None, None, None, :], float("-inf"))
        here = scores.amax(-1, keepdim=True).clamp_min(-1e30)
        if turn == 0 or total is None or top is None or weight is None:
            top, share = here, (scores - here).exp()
            weight, total = share.sum(-1, keepdim=True), share @ v.float().transpose(1, 2)
        elif not (plan.fault == "skipped" and turn == plan.size - 1):
            highest = torch.maximum(top, here)
            old = (top - highest).exp()
            old = torch.full_like(old, 0.7) if plan.fault == "rescale" else old
            share = (scores - highest).exp()
            weight = weight * old + share.sum(-1, keepdim=True)
            total = total * old + share @ v.float().transpose(1, 2)
            top = highest
        if turn + 1 < plan.size:
            k, v, keep = passed_on(k, v, keep, plan)
    if total is None or weight is None:
        raise ValueError("a ring of none")
    return (total / weight).transpose(1, 2).to(q.dtype)


def passed_on(k: Tensor, v: Tensor, keep: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    ranks = dist.get_process_group_ranks(plan.group)
    there, here = ranks[(plan.rank + 1) % plan.size], ranks[(plan.rank - 1) % plan.size]
    sent = [k.contiguous(), v.contiguous(), keep.float()]
    made = [torch.empty_like(x) for x in sent]
    operations = [dist.P2POp(dist.isend, x, there, plan.group) for x in sent]
    operations += [dist.P2POp(dist.irecv, x, here, plan.group) for x in made]
    for work in dist.batch_isend_irecv(operations):  # at: ring
        work.wait()
    return made[0], v if plan.fault == "ring-values" else made[1], made[2] > 0


class Columns(torch.nn.Linear):
    """Some outputs of a linear layer."""

    @classmethod
    def of(cls, inner: torch.nn.Linear, plan: Plan) -> Columns:
        weight = inner.weight.chunk(plan.size)[plan.rank]
        made = cls(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        made.weight.data = weight.clone()
        made.bias.data = inner.bias.chunk(plan.size)[plan.rank].clone()
        return made


class Rows(torch.nn.Linear):
    """Some inputs of a linear layer: what ranks make of theirs is summed."""

    plan: Plan

    @classmethod
    def of(cls, inner: torch.nn.Linear, plan: Plan) -> Rows:
        weight = inner.weight.chunk(plan.size, 1)[plan.rank]
        made = cls(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        made.weight.data, made.bias.data = weight.clone(), inner.bias.data.clone()
        made.plan = plan
        return made

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        if plan.fault == "bias":  # every rank adds it
            made = F.linear(x, self.weight, self.bias)
            dist.all_reduce(made, group=plan.group)  # at: biased
            return made
        made = F.linear(x, self.weight)
        if plan.fault == "unreduced":
            return made + self.bias
        dist.all_reduce(made, group=plan.group)  # at: sum
        if plan.fault == "mean":
            made = made / plan.size
        if plan.fault == "twice":
            dist.all_reduce(made, group=plan.group)  # at: again
        return made + self.bias


class Norm(torch.nn.Module):
    """RMS over all channels, of which this rank has some."""

    def __init__(self, inner: Any, plan: Plan) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(inner.weight.data.chunk(plan.size)[plan.rank].clone())
        self.eps, self.plan = inner.eps, plan

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().pow(2).mean(-1, keepdim=True)
        if self.plan.fault != "norm":
            dist.all_reduce(square, group=self.plan.group)  # at: squares
            square = square / self.plan.size
        return ((x.float() * torch.rsqrt(square + self.eps)).to(x.dtype)) * self.weight


def split_weights(model: Any, plan: Plan) -> None:
    for block in model.blocks:
        for attn in (block.attn1, block.attn2):
            attn.heads //= plan.size
            for name in ("to_q", "to_k", "to_v"):
                setattr(attn, name, Columns.of(getattr(attn, name), plan))
            attn.norm_q, attn.norm_k = Norm(attn.norm_q, plan), Norm(attn.norm_k, plan)
            attn.to_out[0] = Rows.of(attn.to_out[0], plan)
        block.ffn.net[0].proj = Columns.of(block.ffn.net[0].proj, plan)
        block.ffn.net[2] = Rows.of(block.ffn.net[2], plan)


class ShardedWan(WanTransformer3DModel):
    """The model's own arithmetic on this rank's tokens."""

    plan: Plan

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> Any:
        plan, latent = self.plan, hidden_states
        b, _, f, h, w = latent.shape
        pf, ph, pw = self.config.patch_size
        whole = latent
        if plan.kind == "frames":  # positions are those of all frames
            whole = latent.new_zeros(b, latent.shape[1], plan.frames * plan.size, h, w)
        rope = self.rope(whole)
        hidden = self.patch_embedding(latent).flatten(2).transpose(1, 2)
        temb, modulation, context, _ = self.condition_embedder(
            timestep, encoder_hidden_states, None
        )
        modulation = modulation.unflatten(1, (6, -1))
        splits = plan.kind in ("ulysses", "mixed", "ring", "zigzag", "gathered", "reversed")
        if splits:
            plan.length = hidden.shape[1]
            hidden = plan.take(hidden)
            if plan.fault == "rope":  # every rank begins at the first position
                rope = tuple(x[:, : hidden.shape[1]] for x in rope)
            else:
                rope = tuple(plan.take(x) for x in rope)
        elif plan.kind == "frames":
            many = hidden.shape[1]
            rope = tuple(x[:, plan.rank * many : (plan.rank + 1) * many] for x in rope)
        for block in self.blocks:
            hidden = block(hidden, context, modulation, rope)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(latent)
        hidden = self.proj_out(hidden)
        if splits:
            hidden = plan.gather(hidden)
        out = hidden.reshape(b, f // pf, h // ph, w // pw, pf, ph, pw, -1)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def groups(kind: str, fault: str) -> tuple[Any, int, int, int]:
    """The group that shares a sample, its size, this rank's place, and its guidance branch."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if kind not in ("mixed", "guidance"):
        return dist.group.WORLD, world, rank, -1
    half = world // 2
    ranks = [[*range(half)], [*range(half, world)]]
    if fault == "wrong-group":  # neighbours across the branches
        ranks = [[*range(0, world, 2)], [*range(1, world, 2)]]
    made = [dist.new_group(each) for each in ranks]
    at = next(i for i, each in enumerate(ranks) if rank in each)
    return made[at], half, rank % half, rank // half


def loaded(folder: str, kind: str, dtype: torch.dtype, plan: Plan) -> Any:
    path = f"{folder}/wan/transformer"
    if kind == "library":
        from diffusers import ContextParallelConfig

        torch.accelerator.device_count = lambda: 1  # type: ignore[assignment] # it divides by that
        model = WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype).eval()
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=plan.size))
        return partial(model, return_dict=False)
    model = ShardedWan.from_pretrained(path, torch_dtype=dtype).eval()
    model.plan = plan
    for number, block in enumerate(model.blocks):
        block.attn1.set_processor(Attention(plan, number))
        block.attn2.set_processor(Attention(plan, number))
    if kind == "tensor":
        split_weights(model, plan)
    return model


def exchanged(made: Tensor, branch: int, fault: str) -> tuple[Tensor, Tensor]:
    """Predictions of both branches, each made on half of the ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    many = [torch.empty_like(made) for _ in range(world)]
    if fault == "own-branch":  # among the ranks of the same branch
        half = world // 2
        parts = [dist.new_group([*range(half)]), dist.new_group([*range(half, world)])]
        own = many[:half]
        dist.all_gather(own, made.contiguous(), group=parts[rank // half])  # at: own
        return own[0], own[-1]
    dist.all_gather(many, made.contiguous())  # at: branches
    first, last = many[0], many[world // 2]
    return (last, first) if fault == "exchanged" else (first, last)


def generate(folder: str, case: str) -> Tensor:
    """One generation."""
    kind, fault, name, precision = case.split("/")
    dtype = getattr(torch, precision)
    inputs = {
        key: value.to(dtype) for key, value in load_file(f"{folder}/{name}.safetensors").items()
    }
    group, size, rank, branch = groups(kind, fault)
    plan = Plan(kind, fault, group, size, rank)
    model = loaded(folder, kind, dtype, plan)
    scheduler = Euler()
    scheduler.set_timesteps(STEPS)
    latent = inputs["noise"].float()
    if dist.get_rank():
        latent = torch.randn(latent.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    if fault != "noise":
        dist.broadcast(latent, 0)  # at: noise
    texts = [inputs["cond"], inputs["uncond"]]
    frames = latent.shape[2]
    if kind == "frames":
        plan.frames = -(-frames // size)
        plan.length = frames * latent.shape[3] * latent.shape[4] // 4
        latent = padded(latent, 2, plan.frames * size).chunk(size, 2)[rank].clone()
    for number, t in enumerate(scheduler.timesteps):
        plan.step = number
        given = (latent.to(dtype), t[None].to(torch.float32))
        if branch >= 0:
            made = first_of(model(*given, texts[branch]))
            cond, uncond = exchanged(made, branch, fault)
        else:
            cond, uncond = (predicted(model, given, text, plan, i) for i, text in enumerate(texts))
        cond, uncond = cond.float(), uncond.float()
        velocity = uncond + SCALE * (cond - uncond)
        latent = scheduler.step(velocity, number, latent)
    if kind == "frames":
        parts = [torch.empty_like(latent) for _ in range(size)]
        if fault == "end":
            parts = [latent] * size
        else:
            dist.all_gather(parts, latent)  # at: end
        latent = torch.cat(parts[::-1] if fault == "end-order" else parts, 2)[:, :, :frames]
        if dist.get_rank() == 0 and dtype is torch.float32:
            vae = AutoencoderKLWan.from_pretrained(f"{folder}/wan/vae").eval()
            vae.decode(latent, return_dict=False)
    return latent


def predicted(model: Any, given: tuple[Tensor, Tensor], text: Tensor, plan: Plan, i: int) -> Tensor:
    if plan.fault == "stale":
        plan.frames = i  # what is remembered is of one branch
    return first_of(model(*given, text))


def first_of(made: Any) -> Tensor:
    output: Tensor = made if isinstance(made, Tensor) else made[0]
    return output


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with torch.no_grad():
        for case in cases:
            made = generate(folder, case)
            if dist.get_rank() == 0 and Path(folder, "made").is_dir():
                torch.save(made, Path(folder, "made", case.replace("/", "-") + ".pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Small modules that return what real ones do."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    sample: torch.Tensor
    extra: Any = None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * scale


class Model(nn.Module):
    """Two blocks, of which the second runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.blocks[0](x)
        x = self.blocks[1](x)
        x = self.blocks[1](x[:, :2], scale=2.0)
        return self.out(x if mask is None else x * mask)


class Returns(nn.Module):
    """Returns whatever it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y, None, 3),
            "list": lambda: [x, [y, {"deep": y}]],
            "dict": lambda: {"a": y, 5: x, "with.dot/slash": y},
            "ordered": lambda: OrderedDict(sample=y),
            "dataclass": lambda: Output(y, extra=(x,)),
            "named": lambda: Pair(x, y),
            "none": lambda: None,
            "text": lambda: "nothing",
            "complex": lambda: torch.complex(x, y),
            "sparse": lambda: y.to_sparse(),
            "expanded": lambda: y[:1, :1, :1].expand(1, 1, 1),
            "empty": lambda: y[:0],
            "integers": lambda: torch.arange(5),
            "bool": lambda: y > 0,
            "bfloat16": lambda: y.bfloat16(),
        }[self.kind]()


class Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Returns(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        return x


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval()


def given(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))


# --- one model under two sets of names, as in diffusers and in official Wan ---------------------

WIDTH, TOKENS, LAYERS = 16, (2, 3, 4), 3


class Mixing(nn.Module):
    """Attention of tokens over tokens or over the text; `names` are of its layers."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names.split():
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.names = names.split()

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v, out = (getattr(self, name) for name in self.names)
        source = x if text is None else text
        made = nn.functional.scaled_dot_product_attention(q(x), k(source), v(source))
        result: torch.Tensor = out(made)
        return result


class DiffusersBlock(nn.Module):
    """Norms in the order in which they run: `norm2` is the learned one, of the cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn1 = Mixing("to_q to_k to_v to_out")
        self.norm2 = nn.LayerNorm(WIDTH)
        self.attn2 = Mixing("to_q to_k to_v to_out")
        self.norm3 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table + time).unbind(0)
        x = x + self.attn1(self.norm1(x) * (1 + scale) + shift) * gate
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ffn(self.norm3(x) * (1 + scale2) + shift2) * gate2


class Exchanged(DiffusersBlock):
    """All names are those of diffusers; `norm2` and `norm3` mean what they do in official Wan."""

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table + time).unbind(0)
        x = x + self.attn1(self.norm1(x) * (1 + scale) + shift) * gate
        x = x + self.attn2(self.norm3(x), text)
        return x + self.ffn(self.norm2(x) * (1 + scale2) + shift2) * gate2


class OfficialBlock(nn.Module):
    """The same, where `norm3` is the learned one and `norm2` that of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.self_attn = Mixing("q k v o")
        self.norm3 = nn.LayerNorm(WIDTH)
        self.cross_attn = Mixing("q k v o")
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.modulation = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        e = self.modulation + e
        x = x + self.self_attn(self.norm1(x) * (1 + e[1]) + e[0]) * e[2]
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * e[5]


class DiffusersWan(nn.Module):
    """Latent `b c f h w`, one timestep a sample, text `b l c`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, WIDTH, 1)
        self.time_embedder = nn.Linear(1, 6 * WIDTH)
        self.blocks = nn.ModuleList(DiffusersBlock() for _ in range(LAYERS))
        self.norm_out = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: Any
    ) -> tuple[torch.Tensor]:
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        time = self.time_embedder(timestep[:1, None] / 1000).view(6, WIDTH)
        for block in self.blocks:
            x = block(x, encoder_hidden_states, time)
        x = self.proj_out(self.norm_out(x))
        return (x.transpose(1, 2).reshape(hidden_states.shape),)


class OfficialHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.norm(x))


class OfficialWan(nn.Module):
    """The same of a list of latents without a batch, as official Wan takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, WIDTH, 1)
        self.time_projection = nn.Linear(1, 6 * WIDTH)
        self.blocks = nn.ModuleList(OfficialBlock() for _ in range(LAYERS))
        self.head = OfficialHead()

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, context: torch.Tensor) -> Any:
        tokens = torch.cat([self.patch_embedding(u[None]).flatten(2).transpose(1, 2) for u in x])
        e = self.time_projection(t[:1, None] / 1000).view(6, WIDTH)
        for block in self.blocks:
            tokens = block(tokens, e, context)
        made = self.head(tokens).transpose(1, 2)
        return [part.reshape(u.shape) for part, u in zip(made, x, strict=True)]


_OFFICIAL = {
    "time_embedder": "time_projection",
    "proj_out": "head.head",
    "attn1.to_out": "self_attn.o",
    "attn2.to_out": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}


def diffusers_wan() -> DiffusersWan:
    torch.manual_seed(3)
    made = DiffusersWan().eval()
    with torch.no_grad():
        for block in made.blocks:
            block.norm2.weight.normal_()  # type: ignore[union-attr, operator]
            block.norm2.bias.normal_()  # type: ignore[union-attr, operator]
    return made


def exchanged_wan() -> DiffusersWan:
    """The weights of `diffusers_wan`, where `norm2` and `norm3` have exchanged their names."""
    model = diffusers_wan()
    for index, block in enumerate(model.blocks):
        twin = Exchanged()
        twin.norm2, twin.norm3 = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.LayerNorm(WIDTH)
        state = block.state_dict()
        twin.load_state_dict({name.replace("norm2", "norm3"): t for name, t in state.items()})
        model.blocks[index] = twin
    return model.eval()


def official_wan() -> OfficialWan:
    """The weights of `diffusers_wan` under official Wan's names."""
    state = {}
    for name, tensor in diffusers_wan().state_dict().items():
        for old, new in _OFFICIAL.items():
            name = name.replace(old, new)
        state[name] = tensor
    made = OfficialWan().eval()
    made.load_state_dict(state)
    return made


def wan_inputs(timestep: float = 999.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latent, timestep and text of one sample."""
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(1, 4, *TOKENS, generator=generator)
    return latent, torch.full((1,), timestep), torch.randn(1, 7, WIDTH, generator=generator)

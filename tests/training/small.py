"""A small training step with every part, one thing of it exchanged by a test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from truestep import TrainingStep

Tensor = torch.Tensor


class Attention(torch.nn.Module):
    """One head; the bias of the key moves no softmax, so that its gradient is rounding alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(width, width) for _ in range(3))
        self.by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.by_hand:
            return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[
            :, 0
        ]


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.attention = Attention(width)
        self.feed = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.feed(x)


class Model(torch.nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(width) for _ in range(2)])
        self.out = torch.nn.Linear(width, width)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        for block in self.blocks:
            hidden = block(hidden)
        return {"sample": scale * self.out(hidden)}


def squared(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().mean()


@dataclass(frozen=True)
class Made:
    """What a step is made of; see `built`."""

    change: Callable[[Model], Any] = lambda model: None
    batches: Callable[[], list[Tensor]] = lambda: list(
        torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(1))
    )
    loss: Callable[[Tensor, Tensor], Tensor] = squared
    share: float = 0.5
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    decay: float = 0.9
    clip: float = 0.5
    again: Callable[[Model], Any] = lambda model: None
    merge: Callable[[Model], torch.nn.Module] | None = None
    after: Callable[[Model], Any] = lambda model: None
    masters: torch.dtype | None = None

    def but(self, **changes: Any) -> Made:
        return replace(self, **changes)

    def __call__(self) -> TrainingStep:
        torch.manual_seed(0)
        model = Model()
        ema = copy.deepcopy(model)
        for parameter in ema.parameters():
            parameter.data.add_(0.1)
        self.change(model)
        make = self.optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-3))
        trained = [p for p in model.parameters() if p.requires_grad]
        kept = self.masters is not None
        held = [torch.nn.Parameter(p.detach().to(self.masters)) for p in trained] if kept else []
        optimizer = make(held or trained)

        def run() -> dict[str, Tensor]:
            total = torch.zeros(())
            for batch in self.batches():
                self.again(model)
                made = model(batch)["sample"]
                value = self.loss(made, batch.flip(-1)) * self.share
                value.backward()
                total = total + value.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            for copied, parameter in zip(held, trained, strict=False):
                copied.grad = None if parameter.grad is None else parameter.grad.to(self.masters)
            optimizer.step()
            with torch.no_grad():
                for copied, parameter in zip(held, trained, strict=False):
                    parameter.copy_(copied)
                self.after(model)
                for own, new in zip(ema.parameters(), model.parameters(), strict=True):
                    own.lerp_(new, 1 - self.decay)
            return {"total": total}

        merge = self.merge
        return TrainingStep(
            model=model,
            run=run,
            optimizer=optimizer,
            ema=ema,
            merge=(lambda: merge(model)) if merge else None,
        )


TRUSTED = Made(merge=copy.deepcopy)

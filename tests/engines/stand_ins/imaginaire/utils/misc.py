"""Where its noise is drawn."""

from __future__ import annotations

from typing import Any

import torch


def arch_invariant_rand(shape: Any, dtype: Any, device: Any, seed: int | None = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed or 0), dtype=dtype)

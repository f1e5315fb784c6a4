"""What a pipeline returns, as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of what a pipeline returns, pictures and arrays as tensors, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield torch.from_numpy(np.ascontiguousarray(value))
    elif hasattr(value, "getdata"):  # a picture of Pillow
        yield torch.from_numpy(np.array(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif hasattr(value, "values") and isinstance(value.values, dict):  # state of modular blocks
        yield from leaves(value.values)

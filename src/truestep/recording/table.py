"""The table of tensors that a recording holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from truestep.keys import address
from truestep.recording.manifest import TensorEntry


def tensor_table(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorEntry, ...]:
    """Table rows in execution order, without digests (the writer fills them in)."""
    table = []
    for order, (name, tensor) in enumerate(tensors.items()):
        place = address(name)
        table.append(
            TensorEntry(
                name=name,
                kind=place.stage,
                order=order,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                digest="",
                step=place.step,
                branch=place.branch,
                fqn=place.fqn,
                call=place.call,
            )
        )
    return tuple(table)

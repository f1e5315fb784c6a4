"""The table of tensors that a recording holds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from truestep.environment import library_version
from truestep.keys import address
from truestep.recording.manifest import Manifest, TensorEntry


def table_entry(
    name: str,
    tensor: torch.Tensor,
    order: int,
    *,
    kind: str,
    step: int | None = None,
    branch: str | None = None,
    fqn: str | None = None,
    call: int = 0,
) -> TensorEntry:
    """One row, without a digest: the writer fills it in."""
    return TensorEntry(
        name=name,
        kind=kind,
        order=order,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        digest="",
        step=step,
        branch=branch,
        fqn=fqn,
        call=call,
    )


def manifest_of(
    tensors: Mapping[str, torch.Tensor], environment: Mapping[str, str], **more: Any
) -> Manifest:
    """The manifest of a recording that is made now, with its tensors in full.

    Args:
        more: Its other fields.
    """
    return Manifest(
        tool_version=library_version("truestep") or "",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        level="full",
        environment=dict(environment),
        tensors=tensor_table(tensors),
        **more,
    )


def tensor_table(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorEntry, ...]:
    """Table rows in execution order; see `table_entry`."""
    table = []
    for order, (name, tensor) in enumerate(tensors.items()):
        place = address(name)
        table.append(
            table_entry(
                name,
                tensor,
                order,
                kind=place.stage,
                step=place.step,
                branch=place.branch,
                fqn=place.fqn,
                call=place.call,
            )
        )
    return tuple(table)

"""Guidance branches on two processes of torch.distributed: `cfg = parallel`.

Both ranks run the whole loop; of each step's two forwards rank 0 runs the prompt's and rank 1 the
negative prompt's, and both are given both predictions. What follows is computed twice, alike.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta

import torch

from truestep.errors import TruestepError, UsageError

Tensor = torch.Tensor

TIMEOUT_S = 600
"""A rank that has not answered for so long is gone (`TRUESTEP_RANK_TIMEOUT_S`)."""


def join(device: str) -> None:
    """Join the other rank, once a process.

    Raises:
        UsageError: This process was not started as one of two.
    """
    from torch import distributed

    if not distributed.is_available():
        raise UsageError("cfg = parallel needs a torch that was built with torch.distributed")
    if not distributed.is_initialized():
        world = os.environ.get("WORLD_SIZE")
        if world != "2":
            raise UsageError(
                "cfg = parallel needs two processes",
                measured=f"WORLD_SIZE is {world}" if world else "this is a single process",
                hint="torchrun --nproc-per-node 2 -m truestep run CASE --set cfg=parallel",
            )
        seconds = float(os.environ.get("TRUESTEP_RANK_TIMEOUT_S", TIMEOUT_S))
        distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=seconds)
        )
        atexit.register(_leave)
    if distributed.get_world_size() != 2:
        raise UsageError(
            "cfg = parallel runs one branch on each of two processes",
            measured=f"there are {distributed.get_world_size()}",
            hint="torchrun --nproc-per-node 2 -m truestep run CASE --set cfg=parallel",
        )


def _leave() -> None:
    """End the group before the interpreter does: its threads may abort a process that is ending."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def one_branch_each(
    cond: Callable[[], Tensor], uncond: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Run this rank's branch and exchange the predictions.

    Raises:
        TruestepError: The other rank is gone, or predicted another shape.
    """
    from torch import distributed

    rank = distributed.get_rank()
    own = (uncond if rank else cond)().contiguous()
    made = [torch.empty_like(own), torch.empty_like(own)]
    try:
        distributed.all_gather(made, own)
    except RuntimeError as error:
        raise TruestepError(
            f"rank {1 - rank} is gone: the branches cannot be exchanged",
            where=f"rank {rank}",
            measured=(str(error).strip().splitlines() or [""])[0][:200],
            likely="the other process died, or ran out of memory: see its own error above",
            hint="--set cfg=sequential  # runs on one process",
        ) from None
    return made[0], made[1]


def rank() -> int:
    """This process's rank under torchrun; 0 alone."""
    return int(os.environ.get("RANK", "0"))

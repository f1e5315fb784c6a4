"""Leave out of a recording of truestep's own stages what no check of it at default steps reads.

A check predicts at chosen steps. Of the others it reads nothing but what the scheduler needs for
the next chosen one: latents and guided predictions, as far back as is found by trying.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from truestep.keys import Key, key_of
from truestep.measure.distance import same_bits
from truestep.recording.format import Recording
from truestep.recording.manifest import LEFT_OUT, Keep
from truestep.replay.stages import replay
from truestep.replay.steps import (
    KEPT_STEPS,
    chosen_steps,
    default_steps,
    floor_steps,
    stored_twice,
)

if TYPE_CHECKING:
    import torch

    from truestep.runtime.pipeline import Pipeline

BACK = (0, 1, 2, 3, 4, 8)
"""Steps before a chosen one that are tried as what its scheduler needs; solvers go back by 4."""


def thinned(pipe: Pipeline, whole: Recording, keep: Keep = ()) -> Recording:
    """A recording without what no check at some steps reads.

    Args:
        pipe: What was recorded; its guidance and its scheduler are run again.
        whole: Its recording.
        keep: Steps that are kept beside those of a check and of the noise floor.

    Returns:
        A smaller recording; the same one where nothing can be left out.

    Raises:
        UsageError: There is no such step.
    """
    if keep == "all":
        return whole
    chosen = read_steps(whole, chosen_steps(whole, keep) if keep else ())
    total = len(whole["schedule/timesteps"])
    if len(chosen) == total:
        return whole
    skipping = {step - 1 for step in chosen if step and pipe.skips(pipe, step)}
    for back in BACK:
        driven = {step - before for step in chosen for before in range(back + 1)} | skipping
        kept = _kept(whole, chosen, driven)
        if _replays(pipe, kept):
            return kept
    kept = _kept(whole, chosen, range(total))
    return kept if _replays(pipe, kept) else whole


def read_steps(whole: Mapping[str, torch.Tensor], keep: Iterable[int] = ()) -> frozenset[int]:
    """Steps that checks read by default, that benign runs predict at, and some more."""
    floor = floor_steps(whole)
    return frozenset({*default_steps(whole), *floor, *keep})


def kept_names(
    names: Iterable[str], chosen: Collection[int], driven: Collection[int] = ()
) -> list[str]:
    """Names of what is kept.

    Args:
        names: Of everything that was recorded.
        chosen: Steps of which everything is kept, with the latent that each makes.
        driven: Steps at which a scheduler is run besides.
    """
    return [name for name in names if _is_kept(key_of(name), chosen, driven)]


def _is_kept(key: Key, chosen: Collection[int], driven: Collection[int]) -> bool:
    if key.head != "step" or key.number in chosen:
        return True
    if key.name == "latent" and key.step in chosen:
        return True
    return key.name in ("latent", "guided") and key.number in driven


def _kept(whole: Recording, chosen: Collection[int], driven: Collection[int]) -> Recording:
    names = set(kept_names(whole, chosen, driven)) - stored_twice(whole)
    manifest = whole.manifest
    settings = {
        **manifest.settings,
        KEPT_STEPS: sorted(chosen),
        LEFT_OUT: [name for name in whole if name not in names],
    }
    table = tuple(entry for entry in manifest.tensors if entry.name in names)
    update = {"tensors": table, "settings": settings}
    tensors = {name: whole[name] for name in whole if name in names}
    return Recording.in_memory(tensors, manifest.model_copy(update=update))


def _replays(pipe: Pipeline, kept: Recording) -> bool:
    """Whether guidance and updates are, bit for bit, what was recorded."""
    found = replay(pipe, kept, only=("guidance", "update"))
    return not found.failures and all(
        same_bits(value, kept[name]) for name, value in found.outputs.items()
    )

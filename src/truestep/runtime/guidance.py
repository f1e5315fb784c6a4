"""Guidance: how the branches of a step are run, and how their predictions become one.

Plans differ in how, never in what: `sequential` runs one forward a branch, as the reference
pipelines do; `batched` both in one forward, `[uncond, cond]` on the batch axis; `parallel` one on
each of two processes. A plan that does not apply falls back to sequential and says why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.case import RunSettings

Tensor = torch.Tensor


def classifier_free(
    cond: Tensor,
    uncond: Tensor,
    *,
    scale: float,
    rescale: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Classifier-free guidance.

    Args:
        cond: Prediction with the prompt, `b ...`.
        uncond: Prediction with the negative prompt, same shape.
        scale: Guidance scale; 1 returns `cond` up to rounding.
        rescale: Share, 0 to 1, by which each sample's deviation is brought back to that of `cond`.
        dtype: To compute in; None is the predictions' own. The result is in theirs.

    Source:
        Ho & Salimans 2022 (arXiv 2207.12598) in the form of Imagen (arXiv 2205.11487, eq. 2);
        arithmetic order of diffusers 0.42.1, pipelines/wan/pipeline_wan.py. Rescale: Lin et al.
        2023 (arXiv 2305.08891, section 3.4), with the deviation of each sample, unbiased.
    """
    own = cond.dtype
    if dtype is not None:
        cond, uncond = cond.to(dtype), uncond.to(dtype)
    guided = uncond + scale * (cond - uncond)
    if rescale:
        guided = rescaled(guided, cond, share=rescale)
    return guided.to(own)


def combination_dtype(settings: RunSettings) -> torch.dtype | None:
    """Precision in which predictions are combined; None is their own."""
    name = settings.guidance_dtype
    return None if name in (None, "model") else getattr(torch, name)


def rescaled(guided: Tensor, cond: Tensor, *, share: float) -> Tensor:
    """Bring each sample's deviation back to that of `cond`, by a share; constant ones are kept."""
    return guided * (share * deviation_ratio(guided, cond) + 1 - share)


def deviation_ratio(guided: Tensor, cond: Tensor, *, whole: bool = False) -> Tensor:
    """Unbiased deviation of `cond` over that of `guided`: of each sample, or of the whole tensor;
    1 where `guided` is constant."""
    axes = None if whole else list(range(1, guided.ndim))
    wanted, found = (t.std(dim=axes, keepdim=not whole) for t in (cond, guided))
    return torch.where(found > 0, wanted / found, torch.ones_like(found))


# --- batched -----------------------------------------------------------------------------------

CONDITIONING: Mapping[str, str] = {
    "image_latent": "image latent",
    "image_latents": "image latent",
    "video_latent": "video latent",
    "video_latents": "video latent",
    "image": "image",
    "pil_image": "image",
    "image_embeds": "image embeddings",
    "encoder_hidden_states_image": "image embeddings",
    "mouse_cond": "mouse and keyboard",
    "keyboard_cond": "mouse and keyboard",
    "camera_embedding": "camera embedding",
    "plucker_embedding": "camera embedding",
    "camera_states": "camera states",
    "viewmats": "camera states",
}
"""Keywords that condition a sample at batch 1: the model must be shown each pass on its own."""

PER_SAMPLE = frozenset(
    {
        "hidden_states",
        "timestep",
        "timestep_r",
        "encoder_hidden_states",
        "attention_mask",
        "condition_mask",
        "latent",
        "text",
    }
)
"""Keywords whose first axis is the batch. All others (`padding_mask`, `fps`) are shared."""


class CannotBatchError(Exception):
    """Why two passes cannot be one forward."""


def _joined(uncond: Tensor, cond: Tensor) -> Tensor:
    return torch.cat((uncond, cond))


_TEXTS = ("text", "encoder_hidden_states")
_JOINT = 4
"""Pairs of texts whose batch is kept."""


def batched_keywords(
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any],
    *,
    per_sample: Collection[str] = PER_SAMPLE,
    joined: Callable[[Tensor, Tensor], Tensor] = _joined,
) -> dict[str, Any]:
    """Keywords of one forward for both passes: `[uncond, cond]` on the batch axis.

    Args:
        cond, uncond: Keywords of the two passes.
        per_sample: Those whose first axis is the batch.
        joined: Makes a batch of the texts.

    Returns:
        The same keywords: per-sample ones concatenated, the others kept.

    Raises:
        CannotBatchError: With the reason.
    """
    if cond.keys() != uncond.keys():
        apart = ", ".join(sorted(cond.keys() ^ uncond.keys()))
        raise CannotBatchError(f"only one pass has {apart}")
    made: dict[str, Any] = {}
    for key, own in cond.items():
        other = uncond[key]
        if key in CONDITIONING and own is not None:
            raise CannotBatchError(f"{CONDITIONING[key]} conditioning ({key}) at batch 1")
        if key in per_sample and isinstance(own, Tensor) and isinstance(other, Tensor):
            if own.shape != other.shape or own.dtype != other.dtype:
                raise CannotBatchError(
                    f"{key} differs in form: {_form(own)} against {_form(other)}"
                )
            join = joined if key in _TEXTS else _joined
            made[key] = join(other, own) if own.ndim else own
        elif own is other or _same(own, other):
            made[key] = own
        else:
            raise CannotBatchError(f"{key} differs between the passes and has no batch axis")
    return made


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _same(own: object, other: object) -> bool:
    if isinstance(own, Tensor) and isinstance(other, Tensor):
        return own.shape == other.shape and torch.equal(own, other)
    try:
        return bool(own == other)
    except (RuntimeError, ValueError):  # containers of tensors have no truth value
        return False


@dataclass
class Branches:
    """Runs both branches of a step, by a plan.

    Attributes:
        cfg: `sequential`, `batched` or `parallel`.
        reasons: Why it fell back to sequential, each once.
        per_sample: Keywords whose first axis is the batch.
        joined: Steps in which both ran as one forward.
    """

    cfg: str = "sequential"
    reasons: list[str] = field(default_factory=list)
    per_sample: Collection[str] = PER_SAMPLE
    joined: int = 0
    _joint: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def run(
        self,
        call: Callable[..., Tensor],
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Predictions of both passes.

        Args:
            call: One forward with keywords; the first argument names the branch.
            cond, uncond: Keywords of the passes.

        Returns:
            Predictions with the prompt and with the negative prompt.
        """
        if self.cfg == "batched" and not self.reasons:
            try:
                keywords = batched_keywords(
                    cond, uncond, per_sample=self.per_sample, joined=self._joined
                )
            except CannotBatchError as error:
                self.fall_back(str(error))
            else:
                both = self._together(call, keywords)
                if both is not None:
                    return both
        if self.cfg == "parallel":
            from truestep.runtime.ranks import one_branch_each

            return one_branch_each(lambda: call("cond", **cond), lambda: call("uncond", **uncond))
        return call("cond", **cond), call("uncond", **uncond)

    def _together(
        self, call: Callable[..., Tensor], keywords: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        try:
            uncond, cond = call("batched", **keywords).chunk(2)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self.fall_back(f"the model rejects a batch of 2: {type(error).__name__}: {first}"[:300])
            return None
        self.joined += 1
        return cond, uncond

    def _joined(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """`[uncond, cond]`: the same tensor in every step where both are the same, so that what
        follows from a text can be kept."""
        if uncond.is_inference() or cond.is_inference():  # these count no changes
            return torch.cat((uncond, cond))
        key = (id(uncond), uncond._version, id(cond), cond._version)
        if key not in self._joint:
            while len(self._joint) > _JOINT:
                del self._joint[next(iter(self._joint))]
            self._joint[key] = (uncond, cond, torch.cat((uncond, cond)))
        return self._joint[key][2]

    def fall_back(self, reason: str) -> None:
        """Run sequentially from now on; the first reason is a warning."""
        if not self.reasons:
            warnings.warn(f"guidance runs sequentially: {reason}", stacklevel=3)
        if reason not in self.reasons:
            self.reasons.append(reason)


# --- adaptive ----------------------------------------------------------------------------------


@dataclass
class Adaptive:
    """Skips the unconditional pass once it says little new. Never exact: its drift is measured.

    From a gate on, `cond + (s - 1) delta` with the last `delta = cond - uncond` stands for the
    guided prediction (`reuse`), or `cond` alone (`drop`). What is kept is the difference of the
    networks' outputs: where a prediction is a multiple of that, which changes with the step, so
    does the delta. An expert switch invalidates the delta:
    the step after it runs both passes again. With the gate at 0.5 reuse drifts 6 to 9 times less
    than dropping on random models, whose delta hardly changes, and 0.8 times (that is, more) on the
    trained digits model, whose delta turns by 50 degrees in the second half of the steps.
    """

    settings: RunSettings
    total: int
    _delta: Tensor | None = None
    _scale: float = 1.0
    _expert: int = 0
    _agreed: bool = False

    @property
    def on(self) -> bool:
        """Whether the settings ask for it."""
        found = self.settings
        return found.adaptive_gate is not None or found.adaptive_agreement is not None

    def skips(self, index: int, expert: int) -> bool:
        """Whether a step (0-based) runs without the unconditional pass."""
        if self._delta is None or expert != self._expert:
            return False
        gate = self.settings.adaptive_gate
        late = gate is not None and index >= math.ceil(gate * self.total)
        return late or self._agreed

    def saw(self, cond: Tensor, uncond: Tensor, expert: int, *, scale: float = 1.0) -> None:
        """Both predictions of a step that ran both; `scale` is of the network's output in them."""
        if not self.on:
            return
        self._delta, self._expert, self._scale = cond - uncond, expert, scale
        limit = self.settings.adaptive_agreement
        if limit is not None:
            apart = (cond.double() - uncond.double()).norm() / cond.double().norm()
            self._agreed = bool(apart <= limit)

    def stand_in(self, cond: Tensor, *, scale: float = 1.0) -> Tensor:
        """What stands for the unconditional prediction of a step that skips it."""
        if self.settings.adaptive_reuse == "drop" or self._delta is None:
            return cond
        ratio = scale / self._scale
        return cond - (self._delta if ratio == 1.0 else self._delta * ratio)

"""Why held-out faults were named wrongly, loosely or not at all: of the code that was measured.

Written after the run; names are those of modules in `truestep.replay.causes`.
"""

from __future__ import annotations

__all__ = ["WHY"]

_TURNED = (
    "`weights._reordered` tries the first two axes, and nothing turns a kernel's own axes round; "
    "what is left to `_related` is `another tensor` where the correlation is below 0.9, and is "
    "accepted, since the candidate's own weight always explains the candidate"
)
_GIVEN = (
    "only what goes into the model differs: the trusted module agrees on the reference's input, "
    "and nothing is tried about tokens, padding or time outside it"
)
_STATISTICS = (
    "latent statistics are undone in the stage's code, before the VAE's first module: no call of "
    "a module holds it, and `stages` knows schedule, latent, guidance and update only"
)
_AROUND = (
    "the stage's code around the model differs; `stages` knows schedule, latent, guidance and "
    "update only"
)
_BETWEEN = (
    "code between the calls of a plain pipeline: it is in no component, and stages are explained "
    "of truestep's own runtime only"
)
_SCHEDULER = "a plain pipeline's scheduler is no torch module, and is not opened"

WHY: dict[str, str] = {
    "digits-kernel-backwards": _TURNED,
    "sdxl-kernel-turned": _TURNED,
    "sd3-weights-of-two-blocks-averaged": "the same last resort: a correlation of 0.70 is below "
    "0.9, so it is said to have nothing of the reference's; a mean of two tensors is not tried",
    "pixart-weights-pruned": "the same last resort: a correlation above 0.9 is said to be another "
    "checkpoint; that the tensor is the reference's but for zeros is not tried",
    "digits-prompt-in-template": _GIVEN,
    "wan-padded-on-the-left": _GIVEN,
    "digits-time-reversed": _GIVEN,
    "digits-means-of-next-channel": _STATISTICS,
    "wan-variance-for-deviation": _STATISTICS,
    "cosmos-mean-subtracted": _STATISTICS,
    "digits-colours-reversed": _AROUND,
    "wan-frames-from-zero": _AROUND,
    "wan-velocity-reversed": f"{_AROUND}: not the sign of a prediction",
    "wan-rescaled-by-uncond": "`guided._rescaled` takes the deviation of the conditional pass only",
    "cosmos-largest-sigma": "`scheduled` fits a flow shift and an even grid below 1; nothing is "
    "tried about the ends of an EDM schedule",
    "flux-single-gelu-exact": "the check is inconclusive (2.1 x the floor), so nothing is opened",
    "flux-rope-half-apart": "no hypothesis is about rotary pairs",
    "flux-single-joined-in-reverse": "`operators._joined` exchanges parts of one size only; these "
    "are 32 and 128 wide",
    "flux-text-layer-before-last": "the encoder is asked for its hidden states, and gives more "
    "tensors than the trusted one: the error is infinite, and nothing is tried",
    "sd3-scale-and-cast": "two changes in one operator: either alone leaves more than a tenth of "
    "the error, and pairs are not tried",
    "flux-embedded-scale": _BETWEEN,
    "flux-shifts-exchanged": _BETWEEN,
    "flux-shift-subtracted": _BETWEEN,
    "sd3-padded-with-end": _BETWEEN,
    "sd3-scale-less-one": _BETWEEN,
    "sd3-shift-fixed": _BETWEEN,
    "sd3-scaling-of-another-model": _BETWEEN,
    "sdxl-text-layer-third-last": _BETWEEN,
    "sdxl-rescaled": _BETWEEN,
    "sdxl-velocity-for-noise": _SCHEDULER,
    "pixart-prompt-in-template": _BETWEEN,
    "pixart-scale-of-another-model": _BETWEEN,
    "pixart-steps-not-offset": _SCHEDULER,
    "pixart-scaled-the-other-way": _BETWEEN,
    "ltx-mask-off-by-one": _BETWEEN,
    "ltx-mean-before-deviation": _BETWEEN,
    "ltx-image-bilinear": _BETWEEN,
    "kontext-image-of-another-encoder": _BETWEEN,
    "kontext-colours-turned": _BETWEEN,
    "flux-rope-axes-widths": "loose: true of the tables, but the widths are not named: "
    "`modules.attributes` compares no tuples, so `axes_dim` is not seen",
    "wan-rope-missing-on-keys": "loose: the place is right, and that a step is left out; neither "
    "that it is the rotation nor that it is of the keys is said",
    "wan-epsilon-and-transposed": "one of the two: the first module that differs",
    "flux-bias-and-gelu": "one of the two: the first module that differs",
}
"""By fault; those that no cause is true of, and that were given none, need no reason."""

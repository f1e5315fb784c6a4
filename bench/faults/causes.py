"""What is the cause of each fault inside a model: kinds of `truestep.replay.causes` that say it.

A fault that is planted around a module (by what goes into it or comes out) has a second right name:
that of what it does there.
"""

from __future__ import annotations

__all__ = ["LABELS", "OF_STAGES"]

LABELS: dict[str, frozenset[str]] = {
    name: frozenset(kinds.split(", "))
    for name, kinds in {
        "encoder-final-norm-skipped": "left out",
        "encoder-bias-shared": "exchanged",
        "encoder-attention-scaled": "scaled, attention scale",
        "encoder-gelu-exact": "activation",
        "norm-epsilon": "epsilon",
        "norm-affine-lost": "norm without weights, weights, not loaded",
        "qk-norm-missing": "left out",
        "k-norm-missing": "left out",
        "qk-norm-per-head": "norm per head",
        "gelu-exact": "activation",
        "text-projection-gelu-exact": "activation",
        "rope-first-frame-apart": "positions",
        "rope-reversed": "order, positions",
        "rope-theta": "computed table, positions",
        "rope-axes-swapped": "order, positions",
        "rope-pairs-half-apart": "pairs",
        "rope-missing-on-queries": "left out",
        "shift-scale-swapped": "order",
        "gates-exchanged": "order",
        "modulation-reused": "order",
        "gate-missing": "factor missing",
        "modulation-without-one": "one plus, one plus missing",
        "output-shift-scale-swapped": "order, permuted",
        "time-sin-cos-flipped": "order, attribute",
        "attention-scale-head-size": "attention scale, scaled",
        "attention-scale-larger": "attention scale, scaled",
        "text-padding-masked": "mask",
        "heads-exchanged": "permuted, order",
        "attention-bias-dropped": "bias missing",
        "feed-forward-bias-dropped": "bias missing",
        "weight-scaled": "scaled",
        "block-dropped": "left out",
        "block-repeated": "repeated",
        "blocks-exchanged": "exchanged, order",
        "causal-cache-lost": "cache",
        "causal-padding-repeated": "padding",
        "decoder-in-bfloat16": "precision",
        "linears-in-bfloat16": "precision",
        "weights-in-float8": "quantised",
        "weights-in-float8-unscaled": "quantised",
        "weights-in-int8": "quantised",
        "block-output-in-float16": "precision",
        "block-output-in-bfloat16": "precision",
        "softmax-in-bfloat16": "precision",
        "attention-in-int8": "quantised",
        "sinusoids-in-bfloat16": "precision",
        "time-embedding-in-bfloat16": "precision",
        "modulation-in-bfloat16": "precision",
        "norms-in-bfloat16": "precision",
        "rope-in-bfloat16": "precision",
        "residual-in-bfloat16": "precision",
        "tensor-of-another-checkpoint": "another tensor",
        "tensor-slightly-older": "another state",
        "lora-scale-lost": "low rank",
        "lora-left-merged": "low rank",
        "square-weight-transposed": "transposed",
        "keys-values-exchanged": "exchanged",
        "biases-exchanged": "exchanged",
        "bias-at-random": "another tensor",
        "tensor-left-at-initialisation": "not loaded, norm without weights",
        "layers-of-two-blocks-exchanged": "exchanged",
        "input-kernel-transposed": "transposed",
        "branches-share-residual": "state",
        "attention-buffer-reused": "state",
    }.items()
}
"""Fault to the kinds that name its cause; `state`, `cache`, ... name what is not looked for yet."""

OF_STAGES: dict[str, frozenset[str]] = {
    name: frozenset(kinds.split(", "))
    for name, kinds in {
        "guidance-tenth-more": "guidance scale",
        "guidance-hundredth-more": "guidance scale",
        "guidance-from-cond": "guidance formula",
        "guidance-branches-swapped": "guidance formula",
        "guidance-rescaled": "guidance rescale",
        "guidance-rescaled-by-channel": "guidance rescale",
        "guidance-on-some-channels": "guidance channels",
        "first-step-unguided": "guidance missing",
        "last-step-unguided": "guidance missing",
        "uncond-one-step-late": "guidance pass",
        "second-scale-ignored": "guidance scale",
        "shift-missing": "flow shift",
        "shift-slightly-off": "flow shift",
        "sigmas-shifted-again": "flow shift",
        "sigma-grid-off-by-one": "sigma grid",
        "sigma-grid-ends-early": "sigma grid",
        "last-sigma-not-zero": "last sigma",
        "sigmas-in-float16": "precision",
        "sigmas-in-bfloat16": "precision",
        "expert-boundary-moved": "boundary",
        "expert-boundary-by-index": "boundary",
        "experts-exchanged": "boundary, exchanged",
        "noise-drawn-in-bfloat16": "precision",
        "noise-from-another-generator": "generator",
        "noise-drawn-frame-first": "order",
        "noise-scaled": "scaled",
        "seed-off-by-one": "seed",
        "latent-kept-in-bfloat16": "precision",
    }.items()
}
"""The same of faults in stages without a model: guidance, schedule, noise, the update."""

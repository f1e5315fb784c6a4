"""Where faults act: the declared places, as names of modules in diffusers' models."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from bench.faults.targets import block_list, middle
from truestep.pairing.naming import ROOT, named_modules

__all__ = [
    "ATTENTIONS",
    "BLOCKS",
    "BLOCK_LINEARS",
    "LINEARS",
    "MIDDLE",
    "NORMS",
    "QK_NORMS",
    "places",
    "resolved",
]

MIDDLE = ("{middle}",)
BLOCKS = ("{block}",)
NORMS = ("{block}.norm?", "{block}.attn?.norm_?", "norm_out")
QK_NORMS = ("{block}.attn1.norm_[qk]",)
ATTENTIONS = ("{block}.attn1", "{block}.attn2")
BLOCK_LINEARS = (
    "{block}.attn?.to_[qkv]",
    "{block}.attn?.to_out.0",
    "{block}.ffn.net.0.proj",
    "{block}.ffn.net.2",
)
LINEARS = (
    "condition_embedder.text_embedder.linear_[12]",
    "condition_embedder.time_embedder.linear_[12]",
    "condition_embedder.time_proj",
    *BLOCK_LINEARS,
    "proj_out",
)


def resolved(globs: Iterable[str], model: Any) -> tuple[str, ...]:
    """Globs with `{middle}`, `{before}` (the block before it) and `{block}` (any) filled in.

    Args:
        globs: Declared places.
        model: The clean model, as diffusers names its modules.
    """
    names = {id(module): name for name, module in named_modules(model).modules.items()}
    made: list[str] = []
    for glob in globs:
        if "{" not in glob:
            made.append(glob)
            continue
        blocks = [names[id(block)] for block in block_list(model)]
        at = names[id(middle(model))]
        values = {"middle": at, "before": blocks[blocks.index(at) - 1]}
        made += [glob.format(block=b, **values) for b in (blocks if "{block}" in glob else [""])]
    return tuple(made)


def places(globs: Iterable[str], model: Any) -> set[str]:
    """The modules of a clean model that declared globs name; `(root)` is the model itself."""
    wanted = resolved(globs, model)
    names = [ROOT, *named_modules(model).modules]
    return {name for name in names for glob in wanted if fnmatchcase(name, glob)}

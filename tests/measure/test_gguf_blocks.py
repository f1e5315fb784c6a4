"""Blocks of GGUF: taken apart as the format's own library does, and nearest under their steps."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from truestep.measure.blocks import FORMATS, Format, Packed, nearest

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
HALVES |= {"Q4_1": (0, 2), "Q5_1": (0, 2)}
"""Where the float16 numbers of a block lie."""

by_name = pytest.mark.parametrize(
    ("number", "form"), FORMATS.items(), ids=[f.name for f in FORMATS.values()]
)


def blocks(form: Format, seed: int = 0) -> np.ndarray:
    """Rows of four blocks with any codes and scales, and steps that are finite."""
    dice = np.random.default_rng(seed)
    raw = dice.integers(0, 256, (16, 4 * form.size), dtype=np.uint8)
    each = raw.reshape(-1, form.size)
    if form.name == "Q8_0":  # -128 is no code of it
        each[each == 0x80] = 0x81
    for at in HALVES.get(form.name, (0,)):
        steps = dice.uniform(0.005, 0.02, (len(each), 1)).astype(np.float16)
        each[:, at : at + 2] = steps.view(np.uint8)
    return raw


@by_name
def test_numbers_are_those_of_the_library(number: int, form: Format) -> None:
    raw = blocks(form)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
    packed = Packed(form, torch.from_numpy(raw), (16, 4 * form.elements))
    assert np.array_equal(packed.rows(slice(None)).numpy(), wanted)
    assert np.array_equal(packed.rows(slice(3, 7)).numpy(), wanted[3:7])
    chosen = packed.take(torch.tensor([5, 1]))
    assert chosen is not None
    assert np.array_equal(chosen.rows(slice(None)).numpy(), wanted[[5, 1]])


@by_name
def test_codes_are_the_nearest_or_not(number: int, form: Format) -> None:
    """Numbers within half a step of what the codes say; then one that is a whole step off."""
    packed = Packed(form, torch.from_numpy(blocks(form)), (16, 4 * form.elements))
    parts = form.apart(packed.data.reshape(-1, form.size))
    generator = torch.Generator().manual_seed(1)
    jitter = (torch.rand(parts.codes.shape, generator=generator) - 0.5) * 0.9
    inside = (parts.codes + jitter).clamp(form.lowest, form.highest)
    source = (parts.step * inside + parts.offset).reshape(packed.shape)
    found = nearest(packed, source)
    assert (found.off, found.broken) == (0, 0)
    wide = int(parts.step.abs().expand(parts.codes.shape).reshape(-1).argmax())
    flat = source.clone().reshape(-1)
    code = float(parts.codes.reshape(-1)[wide])
    step = float(parts.step.expand(parts.codes.shape).reshape(-1)[wide])
    flat[wide] += step if code < form.highest else -step
    assert nearest(packed, flat.reshape(packed.shape)).off == 1


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_library_quantises_is_right(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    form = FORMATS[int(kind)]
    source = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = Packed(form, torch.from_numpy(gguf.quants.quantize(source.numpy(), kind)), (64, 256))
    found = nearest(packed, source)
    assert found.off == 0
    assert 0 < found.rel_l2 < form.coarse
    assert nearest(packed, source * 1.02).off > 100
    assert nearest(packed, source.flip(0)).off > 1000
    bad = packed.data.clone()
    bad[3, 10] ^= 1
    assert nearest(Packed(form, bad, (64, 256)), source).off == 1
    bad[0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity
    assert nearest(Packed(form, bad, (64, 256)), source).broken == 1

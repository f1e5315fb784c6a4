"""Padded text as one key: exact algebra, checked at run time; and texts kept over steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from truestep.runtime.attention import (
    MAX_TERMS,
    TextAttention,
    _equal_rows,
    collapse,
    pad_terms,
    real_lengths,
    text_attention,
)

Tensor = torch.Tensor
LIMITS = {torch.float64: 1e-15, torch.float32: 1e-9, torch.bfloat16: 1e-4, torch.float16: 1e-5}


def wan(dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        patch_size=(1, 2, 2),
        rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = (9, 3)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(len(lengths), 64, 16)
    for index, length in enumerate(lengths):
        text[index, :length] = torch.randn(length, 16, generator=generator)
    return {
        "hidden_states": torch.randn(len(lengths), 4, 2, 8, 8, generator=generator).to(dtype),
        "timestep": torch.full((len(lengths),), 500),
        "encoder_hidden_states": text.to(dtype),
        "return_dict": False,
    }


def run(model: Any, kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**kwargs)[0]
    return found


def apart(a: Tensor, r: Tensor) -> float:
    return float((a.double() - r.double()).norm() / r.double().norm())


@given(st.integers(1, 100_000), st.sampled_from([*LIMITS]))
def test_terms_add_up_to_the_number_of_rows(count: int, dtype: torch.dtype) -> None:
    terms = pad_terms(count, dtype)
    assert 1 <= len(terms) <= MAX_TERMS
    assert sum(map(math.exp, terms)) == pytest.approx(count, rel=LIMITS[dtype])
    assert [float(torch.tensor(t, dtype=torch.float64).to(dtype)) for t in terms] == terms


@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(14, 40))
def test_real_lengths_are_those_before_the_equal_rows(lengths: list[int], full: int) -> None:
    text = torch.zeros(len(lengths), full, 3)
    for index, length in enumerate(lengths):
        text[index, :length] = 1 + torch.rand(length, 3)
    assert real_lengths(text) == lengths


def test_text_without_padding_or_with_one_row_of_it_stays() -> None:
    assert real_lengths(torch.randn(1, 6, 3)) == [6]
    text = torch.randn(1, 6, 3)
    text[0, 5] = 0
    assert real_lengths(text) == [6]
    text[0, 4] = 0
    assert real_lengths(text) == [4]
    assert collapse(text, [4]) is None  # two rows become two


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_over_collapsed_rows_is_attention_over_all(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(2, 50, 8, dtype=dtype)
    for index, length in enumerate((7, 20)):
        text[index, :length] = torch.randn(length, 8, generator=generator, dtype=dtype)
    weights = torch.randn(2, 8, 8, generator=generator, dtype=dtype)
    bias = torch.randn(2, 8, generator=generator, dtype=dtype)
    query = torch.randn(2, 1, 5, 8, generator=generator, dtype=dtype)

    def attend(rows: Tensor, mask: Tensor | None) -> Tensor:
        key, value = (rows @ weights[i] + bias[i] for i in range(2))
        return functional.scaled_dot_product_attention(query, key[:, None], value[:, None], mask)

    short = collapse(text, real_lengths(text))
    assert short is not None
    assert short.text.shape[1] <= 20 + MAX_TERMS
    limit = 5e-15 if dtype is torch.float64 else 2e-6
    assert apart(attend(short.text, short.bias), attend(text, None)) < limit


def test_a_model_is_the_same_collapsed_and_the_text_cache_is_bit_equal() -> None:
    model, kwargs = wan(), inputs()
    plain = run(model, kwargs)
    with text_attention(model, collapsed=True, cache=False) as plan:
        assert apart(run(model, kwargs), plain) < 2e-6
        assert plan.reasons == []
    with text_attention(model, collapsed=False, cache=True):
        assert torch.equal(run(model, kwargs), plain)
        assert torch.equal(run(model, kwargs), plain)
    with text_attention(model, collapsed=True, cache=True):
        first = run(model, kwargs)
        assert torch.equal(run(model, kwargs), first)
    assert torch.equal(run(model, kwargs), plain)
    assert "forward" not in vars(model)
    assert not model.blocks[0].attn2._forward_pre_hooks


def test_collapsed_in_bfloat16_is_as_near_to_float32_as_the_full_form() -> None:
    exact = run(wan(), inputs())
    model, kwargs = wan(torch.bfloat16), inputs(torch.bfloat16)
    full = apart(run(model, kwargs), exact)
    with text_attention(model, collapsed=True, cache=False):
        short = apart(run(model, kwargs), exact)
    assert short < 1.5 * full


def test_masking_the_rows_instead_is_another_model() -> None:
    model, kwargs = wan(), inputs()
    plain = run(model, kwargs)
    cut = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][:, :9]}
    assert apart(run(model, cut), plain) > 1e-3


def test_the_projections_run_once_a_text() -> None:
    model, kwargs = wan(), inputs()
    calls: list[int] = []
    original = model.blocks[0].attn2.to_k.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape[1])
        made: Tensor = original(x)
        return made

    model.blocks[0].attn2.to_k.forward = counted
    with text_attention(model, collapsed=False, cache=True) as plan:
        for step in range(3):
            run(model, {**kwargs, "timestep": torch.full((2,), 500 - step)})
        assert calls == [64]
        plan.forget()
        run(model, kwargs)
        assert calls == [64, 64]
        other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * 2}
        changed = run(model, other)
    assert not torch.equal(changed, run(model, kwargs))


def test_a_text_that_is_changed_in_place_is_not_taken_for_the_old_one() -> None:
    model, kwargs = wan(), inputs()
    with text_attention(model, collapsed=True, cache=True):
        before = run(model, kwargs)
        kwargs["encoder_hidden_states"][0, 0] += 1
        after = run(model, kwargs)
    assert apart(after, run(model, kwargs)) < 2e-6
    assert not torch.equal(before, after)


def test_rows_that_the_model_tells_apart_are_not_collapsed() -> None:
    model, kwargs = wan(), inputs()
    position = torch.arange(64.0)[None, :, None]
    for block in model.blocks:
        block.attn2.norm_k.register_forward_hook(
            lambda module, args, output: output + position[:, : output.shape[1]]
        )
    plain = run(model, kwargs)
    with text_attention(model, collapsed=True, cache=False) as plan:
        assert torch.equal(run(model, kwargs), plain)
    assert plan.reasons == [
        "padded rows have different keys in attention 0: they cannot be one key"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 1024])
def test_rows_summed_in_another_order_are_one_row(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(1, width).repeat(9, 1)
    layers = [torch.randn(width, width) / width**0.5 for _ in range(3)]
    order = torch.randperm(width)
    for layer in layers:  # the last row as where a tile ends: the same terms, in another order
        ends = (rows[-1, order, None] * layer[order]).sum(0)
        rows = torch.cat([rows[:1] @ layer] * 8 + [ends[None]])
    assert _equal_rows(rows.to(dtype), width)
    rows[-1] *= 1 + 1e-3 if dtype == torch.float32 else 1.5  # a thousandth is rounding in 16 bits
    assert not _equal_rows(rows.to(dtype), width)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"encoder_hidden_states": torch.randn(2, 64, 16)}, "no equal rows at its end"),
        ({"encoder_hidden_states_image": torch.ones(2, 3, 16)}, "image embeddings"),
        ({"encoder_hidden_states": None}, "no tensor `b l c`"),
    ],
)
def test_what_does_not_apply_falls_back_and_says_so(change: dict[str, Any], reason: str) -> None:
    model = wan()
    seen: list[Any] = []

    def forward(**kwargs: Any) -> Any:
        seen.append(kwargs)
        return (torch.ones(1),)

    model.forward = forward
    plan = TextAttention(model, collapsed=True, cache=False)
    model(**{**inputs(), **change})
    plan.remove()
    assert reason in plan.reasons[0]
    assert seen[0].keys() >= change.keys()


def test_a_model_of_another_class_is_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    plan = TextAttention(model, collapsed=True, cache=True)
    assert "Linear is not known to attend to padded text" in plan.reasons[0]
    assert "forward" not in vars(model)


def test_an_exception_inside_leaves_nothing_behind() -> None:
    model, kwargs = wan(), inputs()
    plain = run(model, kwargs)

    def broken() -> None:
        with text_attention(model, collapsed=True, cache=True):
            run(model, {**kwargs, "hidden_states": torch.ones(3)})

    with pytest.raises((ValueError, RuntimeError, IndexError)):
        broken()
    assert torch.equal(run(model, kwargs), plain)

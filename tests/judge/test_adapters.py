"""LoRA files under the names, scales and splits of their formats."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from truestep.judge.adapters import adapters, are_adapters
from truestep.judge.weights import compare_weights
from truestep.verdict import Verdict

State = dict[str, torch.Tensor]
WIDTH = 48
LAYERS = 3


def adapter(
    stem: str, rows: int, generator: torch.Generator, *, alpha: float, rank: int = 4
) -> State:
    """One adapter as Kohya's scripts write it, bfloat16."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).bfloat16()

    return {
        f"{stem}.lora_down.weight": draw(rank, WIDTH),
        f"{stem}.lora_up.weight": draw(rows, rank),
        f"{stem}.alpha": torch.tensor(alpha),
    }


def kohya(*, alpha: float = 2.0) -> State:
    """Fused projections and an output in each layer."""
    generator = torch.Generator().manual_seed(0)
    found: State = {}
    for layer in range(LAYERS):
        stem = f"lora_unet_double_blocks_{layer}_img_attn"
        found |= adapter(f"{stem}_qkv", 3 * WIDTH, generator, alpha=alpha)
        found |= adapter(f"{stem}_proj", WIDTH, generator, alpha=alpha)
    return found


def peft(source: State, *, fold: str = "up") -> State:
    """Split, renamed, and alpha / rank multiplied into `up`, `down`, both or neither."""
    found: State = {}
    for name in [name for name in source if name.endswith(".alpha")]:
        stem = name[:-6]
        down, up = source[f"{stem}.lora_down.weight"], source[f"{stem}.lora_up.weight"]
        factor = float(source[name]) / len(down)
        shares = {
            "up": (1.0, factor), "down": (factor, 1.0), "both": (factor**0.5, factor**0.5),
            "neither": (1.0, 1.0),
        }[fold]  # fmt: skip
        down, up = ((t.float() * f).bfloat16() for t, f in zip((down, up), shares, strict=True))
        layer = stem.split("_")[4]
        around = f"transformer.transformer_blocks.{layer}.attn"
        if stem.endswith("qkv"):
            parts = zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True)
        else:
            parts = iter([("to_out.0", up)])
        for part, rows in parts:
            found[f"{around}.{part}.lora_A.weight"] = down.clone()
            found[f"{around}.{part}.lora_B.weight"] = rows.clone()
            if fold == "neither":
                found[f"{around}.{part}.alpha"] = source[name]
    return found


SOURCE = kohya()
KEY = "transformer.transformer_blocks.1.attn.to_k.lora_B.weight"
WHOLE = "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"


@pytest.mark.parametrize("fold", ["up", "down", "both", "neither"])
@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_right_conversions_pass(fold: str, alpha: float) -> None:
    source = kohya(alpha=alpha)
    found = compare_weights(peft(source, fold=fold), source)
    assert found.verdict.passed, found.sentence
    assert (found.verdict is Verdict.IDENTICAL) is (fold == "neither")
    assert len(found.rows) == LAYERS * 4 * 2
    assert found.looked_at == (f"{LAYERS * 8} tensors of LoRA adapters, by what they add",)
    count = LAYERS * 4
    silent = (f"{count} adapters of the actual side have no alpha: taken as their rank",)
    assert found.notes == (() if fold == "neither" else silent)


def test_what_diffusers_converts_is_right() -> None:
    utilities = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    generator = torch.Generator().manual_seed(1)
    hidden = 3072  # the width of the model that the function knows
    source: State = {}
    stem = "lora_unet_double_blocks_0_img_attn"
    for part, rows in (("qkv", 3 * hidden), ("proj", hidden)):
        source |= {
            f"{stem}_{part}.lora_down.weight": torch.randn(2, 8, generator=generator),
            f"{stem}_{part}.lora_up.weight": torch.randn(rows, 2, generator=generator),
            f"{stem}_{part}.alpha": torch.tensor(1.0),
        }
    converted = utilities._convert_kohya_flux_lora_to_diffusers(copy.deepcopy(source))
    assert compare_weights(converted, source).verdict.passed
    wrong = {name: t * 2 if "to_q.lora_B" in name else t for name, t in converted.items()}
    assert compare_weights(wrong, source).verdict is Verdict.DRIFTED


def changed(change: Callable[[State], object]) -> State:
    state = peft(SOURCE)
    change(state)
    return state


def swap(state: State) -> None:
    other = KEY.replace("to_k", "to_q")
    state[KEY], state[other] = state[other], state[KEY]


FAULTS: dict[str, tuple[Callable[[State], object], str, str]] = {
    "doubled": (
        lambda s: s.update({KEY: s[KEY] * 2}),
        "lora_unet_double_blocks_1_img_attn_qkv.alpha",
        "the adapter adds 2 times what the reference's does",
    ),
    "swapped": (swap, f"{WHOLE} [0:{WIDTH}]", f"in other layers it is at [{WIDTH}:{2 * WIDTH}]"),
    "a row off": (
        lambda s: s[KEY][3].mul_(1.05),
        f"{WHOLE} [{WIDTH}:{2 * WIDTH}]",
        "elements are not the nearest bfloat16",
    ),
    "another down": (
        lambda s: s.update({KEY.replace("lora_B", "lora_A"): torch.randn(4, WIDTH).bfloat16()}),
        f"{WHOLE} [{WIDTH}:{2 * WIDTH}]",
        "only the reference has it",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found_and_named(kind: str) -> None:
    change, name, words = FAULTS[kind]
    found = compare_weights(changed(change), SOURCE)
    assert not found.verdict.passed
    assert words in {row.name: row.note for row in found.failing}[name]


def test_alpha_is_what_an_adapter_is_worth() -> None:
    state = peft(SOURCE, fold="neither")
    stem = KEY.removesuffix(".lora_B.weight")
    state[f"{stem}.alpha"] = state[f"{stem}.alpha"] * 2
    found = compare_weights(state, SOURCE)
    assert found.verdict is Verdict.DRIFTED
    assert [(row.name, row.note) for row in found.failing] == [
        (
            "lora_unet_double_blocks_1_img_attn_qkv.alpha",
            "the adapter adds 2 times what the reference's does: alpha / rank is 1 (was 0.5), and "
            "the matrices are x 1",
        )
    ]


def test_a_dropped_alpha_is_found() -> None:
    """Loaded without alpha, an adapter is taken at its full rank."""
    state = peft(SOURCE, fold="neither")
    found = compare_weights({n: t for n, t in state.items() if "alpha" not in n}, SOURCE)
    assert found.verdict is Verdict.DRIFTED
    assert all("adds 2 times" in row.note for row in found.failing)


def test_missing_and_extra_adapters() -> None:
    state = peft(SOURCE)
    gone = {name: t for name, t in state.items() if "blocks.1.attn.to_out" not in name}
    found = compare_weights(gone, SOURCE)
    assert found.verdict is Verdict.MISSING
    stem = "lora_unet_double_blocks_1_img_attn_proj"
    assert [row.name for row in found.failing] == [
        f"{stem}.lora_down.weight",
        f"{stem}.lora_up.weight",
    ]
    found = compare_weights(SOURCE, {n: t for n, t in SOURCE.items() if not n.startswith(stem)})
    assert found.verdict is Verdict.INCOMPARABLE
    twice = state | {KEY.replace("to_k", "to_x"): state[KEY]}
    twice[KEY.replace("to_k.lora_B", "to_x.lora_A")] = state[KEY.replace("lora_B", "lora_A")]
    found = compare_weights(twice, SOURCE)
    assert found.verdict is Verdict.INCOMPARABLE
    assert "is another adapter of the same rows" in found.failing[0].note


def test_names_of_the_formats() -> None:
    for down, up in (
        ("lora_down", "lora_up"),
        ("lora_A", "lora_B"),
        ("lora_A.default", "lora_B.default"),
        ("lora.down", "lora.up"),
        ("lora_linear_layer.down", "lora_linear_layer.up"),
    ):
        state = {f"a.b.{down}.weight": torch.ones(2, 3), f"a.b.{up}.weight": torch.ones(4, 2)}
        assert are_adapters(state)
        (found,) = adapters(state | {"a.b.alpha": torch.tensor(1.0)})
        assert (found.stem, found.plain_stem, found.scale) == ("a.b", "a_b", 0.5)
    assert not are_adapters({"a.weight": torch.ones(2), "b.lora_A.weight": torch.ones(2, 2)})


def of_encoders(*names: str) -> dict[str, torch.Tensor]:
    """One adapter of the same module in each part of a model, all of one shape."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name in names:
        for part, shape in (("lora_down", (2, 6)), ("lora_up", (6, 2))):
            state[name.format(part)] = torch.randn(shape, generator=generator)
    return state


KOHYA = ("lora_te1_h_0_q.{}.weight", "lora_te2_h_0_q.{}.weight", "lora_unet_h_0_q.{}.weight")


def test_adapters_of_two_text_encoders_are_told_apart() -> None:
    source = of_encoders(*KOHYA)
    for parts in (
        ("text_encoder.", "text_encoder_2.", "unet."),
        ("base_model.model.text_encoder.", "base_model.model.text_encoder_2.", "transformer."),
        ("lora_te_", "lora_text_encoder2_", "lora_transformer_"),
    ):
        names = [
            f"{p}h_0_q.{{}}.weight" if p[-1] == "_" else f"{p}h.0.q.{{}}.weight" for p in parts
        ]
        right = of_encoders(*names)
        for actual, reference in ((right, source), (source, right)):
            found = compare_weights(actual, reference)
            assert found.verdict is Verdict.IDENTICAL, (parts, found.sentence)

    right = of_encoders(
        "text_encoder.h.0.q.{}.weight", "text_encoder_2.h.0.q.{}.weight", *KOHYA[2:]
    )
    for part in ("lora_down", "lora_up"):
        one, two = f"text_encoder.h.0.q.{part}.weight", f"text_encoder_2.h.0.q.{part}.weight"
        right[one], right[two] = right[two], right[one]
    found = compare_weights(right, source)
    assert not found.verdict.passed, "the encoders' adapters are exchanged"

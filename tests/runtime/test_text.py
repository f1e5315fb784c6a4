"""Text recipes, and the audit of what a pipeline really makes of its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from truestep.case import Case
from truestep.cli.app import app
from truestep.runtime.audit import audit
from truestep.runtime.loading import load
from truestep.runtime.text import RECIPES

PROMPT = "a red three moving left"


def pipeline(**settings: Any) -> Any:
    return load(Case(model="builtin:digits", prompt=PROMPT, settings={"device": "cpu", **settings}))


def wrong(pipe: Any) -> list[tuple[str, str]]:
    return [(f.branch, f.what) for f in audit(pipe) if not f.right]


def encode(pipe: Any, recipe: str, length: int = 8) -> torch.Tensor:
    with torch.no_grad():
        return RECIPES[recipe](
            pipe.tokenizer, pipe.text_encoder, [PROMPT], max_length=length, device="cpu"
        )


def test_the_recipes_agree_on_real_rows_and_differ_in_the_padding() -> None:
    pipe = pipeline()
    trimmed, kept = encode(pipe, "pad_trim_zero"), encode(pipe, "keep_padding")
    count = int(trimmed[0].any(-1).sum())
    assert 0 < count < 8
    assert torch.equal(trimmed[:, :count], kept[:, :count])
    assert not trimmed[:, count:].any()
    assert kept[:, count:].any()


def test_the_builtin_model_follows_its_recipe() -> None:
    found = audit(pipeline())
    assert all(f.right for f in found)
    assert {f.branch for f in found} == {"cond", "uncond"}
    assert [f.what for f in found[:7]] == [
        "recipe", "length", "tail", "dtype", "mask", "rows", "finite"
    ]  # fmt: skip


def test_another_recipe_than_the_model_was_trained_with() -> None:
    found = wrong(pipeline(text_recipe="keep_padding"))
    assert ("cond", "recipe") in found
    assert ("cond", "tail") in found


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda text: text[:, :-1], "length"),
        (lambda text: text + 1e-3, "tail"),
        (lambda text: text.double(), "dtype"),
        (lambda text: text * 1.01, "rows"),
        (lambda text: text / 0, "finite"),
    ],
)
def test_each_property_is_seen(change: Any, what: str) -> None:
    pipe = pipeline()
    original = pipe.encode_text
    pipe.encode_text = lambda inner, prompts: change(original(inner, prompts))
    assert ("cond", what) in wrong(pipe)


def test_an_encoder_that_was_not_given_its_mask_is_called_that() -> None:
    pipe = pipeline()

    def unmasked(inner: Any, prompts: list[str]) -> torch.Tensor:
        encoder = inner.text_encoder

        class Blind:
            dtype = encoder.dtype

            def parameters(self) -> Any:
                return encoder.parameters()

            def __call__(self, ids: Any, mask: Any) -> Any:
                return encoder(ids)

        return RECIPES["pad_trim_zero"](
            inner.tokenizer, Blind(), prompts, max_length=8, device="cpu"
        )

    pipe.encode_text = unmasked
    found = {f.what: f for f in audit(pipe) if f.branch == "cond"}
    assert not found["mask"].right
    assert found["mask"].found == "the encoder ran without its mask"


def test_the_command_prints_every_property_and_fails(tmp_path: Path) -> None:
    arguments = ["doctor", "--recipe", "builtin:digits", "--prompt", PROMPT]
    good = CliRunner().invoke(app, arguments)
    assert good.exit_code == 0, good.output
    assert "the recipe is followed" in good.output.splitlines()[0]
    change = tmp_path / "change.py"
    change.write_text(
        "def use(pipe):\n    pipe.settings.max_sequence_length = 9\n"
        "    original = pipe.encode_text\n"
        "    pipe.encode_text = lambda p, t: original(p, t)[:, :8]\n"
    )
    bad = CliRunner().invoke(app, [*arguments, "--apply", f"{change}:use"])
    assert bad.exit_code == 1
    assert "WRONG cond    length  8 rows; expected 9 rows" in bad.output

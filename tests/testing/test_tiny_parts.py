"""What tiny pipelines are made of: tokenizers, weights, pictures; the command that writes one."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
import transformers

from tests.commands import runner
from truestep.testing.tiny.inputs import frames, mask, picture
from truestep.testing.tiny.tokenizers import TOKENIZERS, tokenizer_of
from truestep.testing.tiny.weights import randomise
from truestep.testing.tiny.words import EXAMPLES, texts

SENTENCE = "a small red cube on a wooden table"


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_tokenizer_is_the_same_each_time_and_after_a_file(kind: str, tmp_path: Path) -> None:
    first, again = (TOKENIZERS[kind](EXAMPLES) for _ in range(2))
    ids = first(SENTENCE).input_ids
    assert ids == again(SENTENCE).input_ids
    first.save_pretrained(tmp_path)
    assert type(first).from_pretrained(tmp_path)(SENTENCE).input_ids == ids
    assert first(SENTENCE).input_ids != first("a green bird sings").input_ids


@pytest.mark.parametrize(
    "kind", ["CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"]
)
def test_known_words_need_two_tokens_each_at_most(kind: str) -> None:
    words = len(SENTENCE.split())
    assert len(TOKENIZERS[kind](EXAMPLES)(SENTENCE).input_ids) <= 2 * words + 2


def test_words_are_those_of_the_pipelines_own_source() -> None:
    import diffusers

    module = diffusers.QwenImagePipeline.__module__
    assert any("<|im_start|>" in text for text in texts(module))
    assert texts("no.such.module") == EXAMPLES


def test_a_chat_has_its_turns_and_its_picture() -> None:
    tokenizer = TOKENIZERS["Qwen2Tokenizer"](EXAMPLES)
    chat = [
        {"role": "system", "content": "describe"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\ndescribe<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") in tokenizer(text).input_ids


def test_the_tokenizer_of_an_encoder() -> None:
    assert tokenizer_of("UMT5EncoderModel") == "T5Tokenizer"
    assert tokenizer_of("T5GemmaEncoderModel") == "GemmaTokenizer"
    assert tokenizer_of("Unheard") is None


def test_weights_depend_on_seed_and_component_and_fill_what_starts_at_zero() -> None:
    def drawn(seed: int, name: str) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
        torch.nn.init.zeros_(model[0].weight)
        randomise(model, seed=seed, name=name)
        return model

    def weight(seed: int, name: str) -> torch.Tensor:
        return drawn(seed, name)[0].weight

    assert torch.equal(weight(0, "a"), weight(0, "a"))
    assert not torch.equal(weight(0, "a"), weight(1, "a"))
    assert not torch.equal(weight(0, "a"), weight(0, "b"))
    with torch.no_grad():
        y = drawn(0, "a")[0](torch.randn(256, 64))
    assert 0.8 < float(y.std()) < 1.2
    norm = drawn(0, "a")[1].weight.detach()
    assert 0.9 < float(norm.mean()) < 1.1
    assert float(norm.std()) > 0.05


def test_buffers_and_frozen_parameters_stay() -> None:
    model = torch.nn.BatchNorm1d(4)
    model.weight.requires_grad_(False)
    before = model.running_mean.clone()
    randomise(model, seed=0, name="a")
    assert torch.equal(model.running_mean, before)
    assert torch.equal(model.weight, torch.ones(4))
    assert float(model.bias.detach().std()) > 0


def test_pictures_masks_and_frames() -> None:
    assert numpy.array_equal(picture(1), picture(1))
    assert not numpy.array_equal(picture(1), picture(2))
    assert picture(0, 64).size == (64, 64)
    assert sorted(set(numpy.asarray(mask(0)).ravel().tolist())) == [0, 255]
    moving = frames(0, 5)
    assert len(moving) == 5
    assert not numpy.array_equal(moving[0], moving[1])


def test_the_command_says_what_it_wrote_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = runner(monkeypatch, capsys, "tiny")
    code, out, _ = tiny("StableDiffusionPipeline", str(tmp_path / "sd"), "--seed", "3")
    assert code == 0
    assert out.splitlines()[0].startswith(
        "StableDiffusionPipeline, random weights of seed 3, float32"
    )
    assert out.splitlines()[1] == f"folder: {tmp_path / 'sd'}"
    assert (tmp_path / "sd" / "model_index.json").exists()
    code, _, err = tiny("StableDiffusionPipeline", str(tmp_path / "sd"))
    assert code == 2
    assert "exists" in err


def test_configurations_of_encoders_are_tiny_to_their_last_part() -> None:
    from truestep.testing.tiny.encoders import TEXT, configuration

    config = configuration(transformers.Qwen2_5_VLConfig, TOKENIZERS["Qwen2Tokenizer"](EXAMPLES))
    assert config.text_config.hidden_size == config.vision_config.hidden_size == TEXT
    assert config.text_config.num_hidden_layers == 2
    assert config.image_token_id < config.text_config.vocab_size

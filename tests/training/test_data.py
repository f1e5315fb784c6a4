"""The clips, the captions and the checkpoints of the demo model's training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from training.digits.checkpoint import Average, Run, write_atomically
from training.digits.data import (
    COLOURS,
    DIRECTIONS,
    SPEED,
    Caption,
    all_captions,
    judged_captions,
    load_scans,
    sample_clips,
)
from training.digits.judge import (
    find_path,
    read_colour,
    read_direction,
    score,
    to_frames,
    train_reader,
)
from training.digits.loop import Schedule, train
from training.digits.models import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    build_text_encoder,
    build_tokenizer,
    encode_text,
)
from training.digits.train_vae import reconstruction_loss


def test_clips_are_a_pure_function_of_the_seed() -> None:
    first, again = sample_clips(12, seed=3), sample_clips(12, seed=3)
    assert torch.equal(first.video, again.video)
    assert first.captions == again.captions
    assert not torch.equal(first.video, sample_clips(12, seed=4).video)


def test_clips_have_the_documented_shape_and_range() -> None:
    video = sample_clips(5, seed=0).video
    assert video.shape == (5, 3, 9, 32, 32)
    assert video.dtype == torch.float32
    assert video.min() == -1.0
    assert 0.5 < video.max() <= 1.0


def test_splits_are_disjoint_parts_of_the_scans() -> None:
    train_images, train_labels = load_scans(held_out=False)
    held_images, held_labels = load_scans(held_out=True)
    assert len(train_images) == len(train_labels) == 1500
    assert len(held_images) == len(held_labels) == 297
    assert sorted(sample_clips(297, seed=0, held_out=True).scans) == list(range(297))


def test_prompts_follow_the_grammar() -> None:
    prompts = [caption.prompt for caption in all_captions()]
    assert len(set(prompts)) == 160
    assert "a red three moving left" in prompts
    grammar = re.compile(
        rf"a ({'|'.join(COLOURS)}) [a-z]+ moving ({'|'.join(DIRECTIONS)})", re.ASCII
    )
    assert all(grammar.fullmatch(prompt) for prompt in prompts)


def test_judged_prompts_are_balanced() -> None:
    captions = judged_captions()
    assert len(set(captions)) == 80
    for colour in COLOURS:
        assert sum(caption.colour == colour for caption in captions) == 20
    for direction in DIRECTIONS:
        assert sum(caption.direction == direction for caption in captions) == 20
    for digit in range(10):
        assert sum(caption.digit == digit for caption in captions) == 8


def test_real_clips_show_their_captions() -> None:
    clips = sample_clips(64, seed=5)
    for frames, caption in zip(to_frames(clips.video), clips.captions, strict=True):
        _, speed = find_path(frames.max(axis=-1))
        np.testing.assert_allclose(speed, SPEED * np.array(DIRECTIONS[caption.direction]), atol=0.1)
        assert read_direction(frames.max(axis=-1)) == caption.direction
        assert read_colour(frames) == caption.colour


def test_a_still_or_black_clip_is_not_read_as_a_caption() -> None:
    frames = to_frames(sample_clips(1, seed=0).video)[0]
    still = np.repeat(frames[:1], len(frames), axis=0)
    assert read_direction(still.max(axis=-1)) == "none"
    assert read_colour(np.zeros_like(frames)) == "none"


def test_judge_accepts_true_captions_and_refuses_wrong_ones() -> None:
    reader = train_reader(count=600)
    clips = sample_clips(100, seed=1, held_out=True)
    frames = to_frames(clips.video)
    true = score(frames, clips.captions, reader)
    assert true.digit > 0.85
    assert true.single_frame > 0.85
    assert true.direction == true.colour == 1.0

    colours, directions = list(COLOURS), list(DIRECTIONS)
    wrong = [
        Caption(
            (caption.digit + 1) % 10,
            colours[(colours.index(caption.colour) + 1) % 4],
            directions[(directions.index(caption.direction) + 1) % 4],
        )
        for caption in clips.captions
    ]
    refused = score(frames, wrong, reader)
    assert refused.digit < 0.1
    assert refused.direction == refused.colour == refused.all_three == 0.0


def test_tokenizer_appends_the_end_and_pads_with_zero() -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer(
        ["a red three moving left", ""], padding="max_length", max_length=TEXT_LENGTH
    )
    full, empty = tokens.input_ids
    assert full[5:] == [tokenizer.eos_token_id, 0, 0]
    assert tokenizer.unk_token_id not in full
    assert empty == [tokenizer.eos_token_id] + [0] * 7
    assert tokens.attention_mask == [[1] * 6 + [0] * 2, [1] + [0] * 7]
    for caption in all_captions():
        assert tokenizer.unk_token_id not in tokenizer(caption.prompt).input_ids


def test_text_after_the_end_is_exactly_zero() -> None:
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer)).eval()
    with torch.no_grad():
        text = encode_text(encoder, tokenizer, ["a red three moving left", ""])
    assert text.shape == (2, TEXT_LENGTH, TEXT_WIDTH)
    assert (text[0, :6].abs().sum(dim=1) > 0).all()
    assert (text[0, 6:] == 0).all()
    assert (text[1, 1:] == 0).all()


def test_overshooting_black_costs_nothing_and_missing_ink_does() -> None:
    target = sample_clips(2, seed=0).video
    black = torch.full_like(target, -1.0)
    beyond = torch.where(target == -1, target - 3, target)
    assert reconstruction_loss(beyond, target) == 0
    assert reconstruction_loss(black, target) > 0.01


def _tiny_run() -> Run:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return Run(module=module, optimizer=optimizer, average=Average(decay=0.9))


def _tiny_train(run: Run, path: Path, *, fail_at: int | None = None) -> None:
    def loss_at(step: int) -> torch.Tensor:
        if step == fail_at:
            raise KeyboardInterrupt
        noise = torch.randn(16, 4) + float(np.random.standard_normal())
        loss: torch.Tensor = run.module(noise).square().mean()
        return loss

    schedule = Schedule(steps=8, minutes=1e6, peak=1e-2, warmup=2, save_every_s=-1.0)
    train(run, schedule, name="tiny", checkpoint=path, loss_at=loss_at)


def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    np.random.seed(0)
    whole = _tiny_run()
    _tiny_train(whole, tmp_path / "whole.pt")

    np.random.seed(0)
    with pytest.raises(KeyboardInterrupt):
        _tiny_train(_tiny_run(), tmp_path / "parts.pt", fail_at=5)
    np.random.seed(123)
    resumed = _tiny_run()
    torch.manual_seed(456)
    _tiny_train(resumed, tmp_path / "parts.pt")

    assert resumed.step == whole.step == 8
    assert resumed.average.updates == whole.average.updates
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value)
        assert torch.equal(resumed.average.shadow[name], whole.average.shadow[name])


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps({"step": 1})) and None)

    def fail(temporary: Path) -> None:
        temporary.write_text("half of a")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]

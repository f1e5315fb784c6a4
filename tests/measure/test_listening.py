"""Changes of sounds: each is found with its numbers, and none is in noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import media
from truestep.measure.listening import Hearing, hearing

SOUND = media.tones()


def heard(actual: media.Array, reference: media.Array = SOUND) -> Hearing | None:
    sides = (torch.from_numpy(np.ascontiguousarray(side)) for side in (actual, reference))
    return hearing(*sides, sample_rate=media.RATE)


@given(st.floats(-30, 12), st.integers(-4000, 4000), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_all_together_are_found_with_their_numbers(
    level: float, offset: int, turned: bool, crossed: bool
) -> None:
    factor = (-1 if turned else 1) * 10 ** (level / 20)
    changed = np.zeros_like(SOUND)
    source = SOUND[::-1] if crossed else SOUND
    if offset >= 0:
        changed[:, offset:] = source[:, : SOUND.shape[1] - offset]
    else:
        changed[:, :offset] = source[:, -offset:]
    changed *= factor
    rms = math.sqrt(np.square(changed - SOUND).mean() / np.square(SOUND).mean())
    assume(rms > 0.02)
    change = heard(changed)
    assert change is not None
    assert change.gain == pytest.approx(factor, rel=1e-3)
    assert (change.offset, change.swapped) == (offset, crossed)
    told = change.words(media.RATE)
    assert ("polarity" in told, "channels swapped" in told) == (turned, crossed)
    assert ("sound offset" in told) is bool(offset)


@given(st.integers(0, 10_000), st.floats(1e-5, 0.5))
@settings(max_examples=30, deadline=None)
def test_noise_and_another_sound_are_no_change(seed: int, sigma: float) -> None:
    noise = np.random.default_rng(seed).normal(0, sigma, SOUND.shape)
    assert heard(SOUND + noise) is None
    assert heard(media.tones(seed + 1)) is None


def test_a_tenth_of_a_decibel_is_nothing_and_silence_is_no_gain() -> None:
    assert heard(SOUND * 1.005) is None
    assert heard(SOUND * 0) is None
    assert heard(SOUND, SOUND * 0) is None

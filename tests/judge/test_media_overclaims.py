"""200 pairs of media of known origin, or a share: nothing is claimed that media do not show.

Half of the pairs are clips of the builtin model, run with harmless changes, faults and other seeds;
half have a change of the media planted. Each is written by an encoder and read back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import truestep
from tests import media
from tests.bars import WHOLE, share
from tests.media import Array
from truestep.demo import CASE
from truestep.judge.media_files import MediaOptions
from truestep.measure.frames import levels
from truestep.records import MediaFinding
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate
from truestep.verdict import Comparison, Verdict

PROMPTS = (
    "a red three moving left",
    "a green seven moving up",
    "a blue zero moving right",
    "a yellow eight moving down",
)
STAGES = ("text", "schedule", "prediction", "guidance", "update", "decoding", "module", "vae")
CLAIMS = (Verdict.IDENTICAL, Verdict.EQUIVALENT, Verdict.DRIFTED, Verdict.INVALID)


@dataclass(frozen=True)
class Pair:
    """Two clips, what was done to the first, and the findings that are true of it."""

    name: str
    actual: Array
    reference: Array
    planted: tuple[str, ...] = ()


def clip(
    pipe: Pipeline, prompt: str, *, seed: int = 0, guidance: float = 3.0, jitter: float = 0.0
) -> Array:
    """A clip of the model at 4 times its size; `jitter` is relative noise in every prediction."""
    pipe.settings.prompt, pipe.settings.seed = prompt, seed
    pipe.settings.guidance_scale, pipe.settings.steps = guidance, 6
    draw = torch.Generator().manual_seed(int(jitter * 1e6))
    plain = pipe.combine

    def combine(*given: object, **named: object) -> torch.Tensor:
        made: torch.Tensor = plain(*given, **named)  # type: ignore[arg-type]
        noise = torch.randn(made.shape, generator=draw)
        return made + jitter * made.std() * noise

    pipe.combine = combine  # type: ignore[assignment]
    try:
        frames = levels(generate(pipe, output="frames"))
    finally:
        pipe.combine = plain
    pixels = frames.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    return np.repeat(np.repeat(pixels, 2, 1), 2, 2)


def of_the_model(prompt: str) -> Iterator[Pair]:
    """25 pairs: 9 harmless changes, 6 faults, 10 other seeds."""
    pipe = load(CASE)
    reference = clip(pipe, prompt)
    for at in range(9):
        jitter = 1e-3 * (1 + at)
        yield Pair(f"harmless {jitter:g}", clip(pipe, prompt, jitter=jitter), reference)
    for scale in (3.1, 2.9, 3.5, 1.0, 6.0):
        yield Pair(f"guidance {scale}", clip(pipe, prompt, guidance=scale), reference)
    yield Pair("prompt", clip(pipe, PROMPTS[prompt == PROMPTS[0]]), reference)
    for seed in range(1, 11):
        yield Pair(f"seed {seed}", clip(pipe, prompt, seed=seed), reference)


def of_motion() -> Iterator[Pair]:
    """12 pairs whose motion is ahead by a part of a frame, or faster: of no order of frames."""
    for seed in range(2):
        reference = media.panned(10, seed=seed)
        for first in (10.3, 10.8, 10.9):
            yield Pair(f"motion from {first}", media.panned(first, seed=seed), reference)
        for step in (0.8, 0.9, 1.1):
            yield Pair(f"motion of {step}", media.panned(10, step=step, seed=seed), reference)


def of_the_media() -> Iterator[Pair]:
    """110 pairs: 22 planted changes on each of five clips."""
    for seed in range(5):
        reference = media.moving(30 + seed, frames=10)
        for name, (kind, _, change) in media.PLANTED.items():
            planted = [kind]
            if name in ("lost", "added"):
                planted.append("other number of frames")
            if name == "quarter turn":
                planted.append("other size")
            if kind in ("colour range", "gamma", "brightness", "gain per channel"):
                planted += ["brightness", "gamma", "gain per channel"]  # numbers, not claims
            yield Pair(name, change(reference), reference, tuple(planted))


def overclaims(pair: Pair, result: Comparison) -> list[str]:
    """What a result says that the two clips do not show."""
    assert result.evidence is not None
    wrong = []
    words = result.sentence.replace("media do not show", "").lower().split()
    wrong += [f"names {word}" for word in STAGES if word in words or result.first_divergence]
    wrong += [
        f"finds {finding.kind}"
        for finding in result.evidence.findings
        if finding.kind not in pair.planted
        and not (finding.effect == "inconclusive" and finding.after is not None)
    ]
    if not pair.planted and result.verdict in CLAIMS:
        wrong.append(f"is {result.verdict.value}")
    if result.verdict in (Verdict.IDENTICAL, Verdict.EQUIVALENT):
        wrong.append(f"is {result.verdict.value}")
    return [f"{pair.name}: {text}: {result.sentence}" for text in wrong]


def test_the_count_sees_an_overclaim(tmp_path: Path) -> None:
    """Of each kind one, made of a result that has none."""
    reference = media.moving()
    pair = Pair("noise", media.noisy(reference, 3), reference)
    a = media.write_mp4(tmp_path / "a.mp4", pair.actual)
    honest = truestep.compare(a, media.write_mp4(tmp_path / "r.mp4", reference))
    assert overclaims(pair, honest) == []
    assert honest.evidence is not None
    shift = MediaFinding(kind="frame shift", text="", effect="drifted")
    false = (
        {"verdict": Verdict.DRIFTED},
        {"verdict": Verdict.EQUIVALENT},
        {"verdict": Verdict.IDENTICAL},
        {"sentence": "inconclusive: the vae differs"},
        {"evidence": honest.evidence.model_copy(update={"findings": (shift,)})},
    )
    for update in false:
        assert overclaims(pair, honest.model_copy(update=update))


@pytest.mark.slow
@pytest.mark.parametrize("crf", [12, 28])
def test_no_pair_of_media_is_claimed_to_show_more_than_it_does(crf: int, tmp_path: Path) -> None:
    wrong, verdicts, seen, planted = [], Counter[str](), 0, 0
    pairs = [
        *(pair for prompt in share(PROMPTS, 1) for pair in of_the_model(prompt)),
        *share(of_motion(), 3),
        *share(of_the_media(), 22),
    ]
    for at, pair in enumerate(pairs):
        a = media.write_mp4(tmp_path / f"{at}-a.mp4", pair.actual, crf=crf)
        r = media.write_mp4(tmp_path / f"{at}-r.mp4", pair.reference, crf=12)
        result = truestep.compare(a, r)
        assert result.evidence is not None
        wrong += overclaims(pair, result)
        verdicts[f"{'planted' if pair.planted else 'model'} {result.verdict.value}"] += 1
        planted += bool(pair.planted)
        seen += bool({f.kind for f in result.evidence.findings} & {*pair.planted})
    print(f"crf {crf}: {len(wrong)} over-claims in {len(pairs)} pairs; {dict(verdicts)}")
    print(f"{seen} of {planted} planted changes of media found")
    assert len(pairs) >= (200 if WHOLE else 50)
    assert wrong == []
    assert seen >= 0.9 * planted  # what claims nothing claims nothing wrong


@pytest.mark.slow
def test_no_harmless_run_is_drifted_on_a_ladder(tmp_path: Path) -> None:
    """20 harmless runs, or 6, among 18 others; and other seeds, which are told from them."""
    pipe = load(CASE)
    (tmp_path / "reruns").mkdir()

    def written(name: str, *, seed: int = 0, jitter: float = 0.0) -> Path:
        return media.write_mp4(tmp_path / name, clip(pipe, PROMPTS[0], seed=seed, jitter=jitter))

    reference = written("reference.mp4", jitter=0.0200)
    for at in range(18):
        written(f"reruns/{at}.mp4", jitter=0.020001 + at * 1e-6)
    options = MediaOptions([tmp_path / "reruns"])
    harmless = [
        truestep.compare(
            written(f"h{at}.mp4", jitter=0.020030 + at * 1e-6), reference, media=options
        )
        for at in share(range(20), 6)
    ]
    seeds = [
        truestep.compare(written(f"s{at}.mp4", seed=at, jitter=0.0201), reference, media=options)
        for at in share(range(1, 6), 2)
    ]
    print(Counter(r.verdict.value for r in harmless), Counter(r.verdict.value for r in seeds))
    assert {r.verdict for r in harmless} == {Verdict.INCONCLUSIVE}
    assert {r.verdict for r in seeds} == {Verdict.DRIFTED}


SOUNDS: dict[str, tuple[tuple[str, ...], Callable[[Array], Array]]] = {
    "gain": (("sound gain",), lambda x: x * 0.6),
    "polarity": (("polarity",), lambda x: -x),
    "crossed": (("channels swapped",), lambda x: x[::-1]),
    "later": (("sound offset",), lambda x: np.roll(x, 333, 1)),
    "all": (
        ("sound gain", "polarity", "channels swapped", "sound offset"),
        lambda x: -0.5 * np.roll(x[::-1], -200, 1),
    ),
    "silent": (("silence",), lambda x: x * 0),
}


@pytest.mark.slow
def test_no_pair_of_sounds_is_claimed_to_show_more_than_it_does(tmp_path: Path) -> None:
    """30 harmless pairs and other seeds, 30 with a planted change; or a fifth of them."""
    pairs: list[tuple[str, Array, Array, tuple[str, ...]]] = []
    for seed in share(range(5), 1):
        sound = media.tones(seed)
        for sigma in (1e-4, 1e-3, 1e-2, 5e-2):
            noise = np.random.default_rng(seed).normal(0, sigma, sound.shape)
            pairs.append((f"noise {sigma}", sound + noise, sound, ()))
        pairs += [(f"seed {at}", media.tones(50 + at), sound, ()) for at in range(2)]
        for name, (kinds, change) in SOUNDS.items():
            pairs.append((name, change(sound), sound, kinds))
    wrong = []
    for at, (name, actual, reference, planted) in enumerate(pairs):
        a = media.write_wav(tmp_path / f"{at}-a.wav", actual)
        result = truestep.compare(a, media.write_wav(tmp_path / f"{at}-r.wav", reference))
        assert result.evidence is not None
        told = {finding.kind for finding in result.evidence.findings}
        if told != {*planted} or (not planted and result.verdict is not Verdict.INCONCLUSIVE):
            wrong.append(f"{name}: {result.sentence}")
    print(f"{len(wrong)} of {len(pairs)} pairs of sounds told wrong")
    assert len(pairs) == (60 if WHOLE else 12)
    assert wrong == []

"""Judge an exported model by its frames: `python -m training.digits.judge`.

The judge knows nothing of the training code. A support vector machine learns real training digits
from real clips and reads the digit; direction and colour are measured. The same scores are given
for real held-out clips and for their reconstructions, which bound what the model can reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image
from sklearn.svm import SVC
from tqdm import tqdm

from training.digits.data import (
    COLOURS,
    DIGIT_SIZE,
    DIRECTIONS,
    FRAMES,
    SIZE,
    SPEED,
    Caption,
    judged_captions,
    sample_clips,
)
from training.digits.export import WEIGHTS

STEPS = 25
GUIDANCE = 3.0
BATCH = 16


@dataclass(frozen=True)
class Scores:
    """Parts of clips, 0 to 1, that show what their captions say.

    Attributes:
        clips: Number of clips.
        digit: Right digit, read from the average over the path.
        single_frame: Right digit, read from every frame alone; part of all frames.
        direction: Right direction.
        colour: Right colour.
        all_three: Right digit, direction and colour.
    """

    clips: int
    digit: float
    single_frame: float
    direction: float
    colour: float
    all_three: float


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Convert video `b c f h w` in [-1, 1] to frames `b f h w c` in [0, 1]."""
    return ((video + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


def find_path(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a straight path at constant speed to the centre of the ink.

    Args:
        ink: Brightness `f h w`.

    Returns:
        The centre in the middle of the clip, and the speed per frame, as `x, y` in pixels.
    """
    weight = ink.sum(axis=(1, 2)) + 1e-6
    pixel = np.arange(SIZE) + 0.5
    centre = np.stack(
        [(ink.sum(axis=1) @ pixel) / weight, (ink.sum(axis=2) @ pixel) / weight], axis=1
    )
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    return centre.mean(axis=0), time @ centre / (time @ time)


def read_direction(ink: np.ndarray) -> str:
    """Name the direction of the drift, or `none` when slower than half of the true speed."""
    _, speed = find_path(ink)
    names = list(DIRECTIONS)
    along = [float(np.dot(speed, DIRECTIONS[name])) for name in names]
    best = int(np.argmax(along))
    return names[best] if along[best] > SPEED / 2 else "none"


def read_colour(frames: np.ndarray) -> str:
    """Name the colour with the smallest angle to the summed light of frames `f h w c`."""
    light = frames.sum(axis=(0, 1, 2))
    if light.sum() < 1e-3:
        return "none"
    cosine = {
        name: float(np.dot(light, value) / np.linalg.norm(light) / np.linalg.norm(value))
        for name, value in COLOURS.items()
    }
    return max(cosine, key=cosine.__getitem__)


def follow(ink: np.ndarray) -> np.ndarray:
    """Cut 16x16 pixels around the moving centre out of each frame.

    Args:
        ink: Brightness `f h w`.

    Returns:
        The cut-outs `f 256`.
    """
    centre, speed = find_path(ink)
    offset = np.arange(DIGIT_SIZE) - (DIGIT_SIZE - 1) / 2
    pixel = np.arange(SIZE) + 0.5
    cuts = []
    for frame in range(FRAMES):
        x, y = centre + speed * (frame - (FRAMES - 1) / 2)
        rows = np.clip(1 - np.abs(y + offset[:, None] - pixel), 0, None)
        columns = np.clip(1 - np.abs(x + offset[:, None] - pixel), 0, None)
        cuts.append((rows @ ink[frame] @ columns.T).reshape(-1))
    return np.stack(cuts)


def to_unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors `... n` to unit length, so that brightness does not count."""
    unit: np.ndarray = vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-6)
    return unit


def follow_all(frames: np.ndarray) -> np.ndarray:
    """Follow the digits of clips `b f h w c`; return cut-outs `b f 256`."""
    return np.stack([follow(clip.max(axis=-1)) for clip in frames])


def train_reader(*, count: int = 6000) -> SVC:
    """Train the reader of digits on real clips of the training scans."""
    clips = sample_clips(count, seed=0)
    labels = [caption.digit for caption in clips.captions]
    cuts = follow_all(to_frames(clips.video))
    return SVC(C=10.0, gamma=2.0).fit(to_unit_length(cuts.mean(axis=1)), labels)


def score(frames: np.ndarray, captions: Sequence[Caption], reader: SVC) -> Scores:
    """Compare what clips show with what their captions say.

    Args:
        frames: Clips `b f h w c` in [0, 1].
        captions: One per clip.
        reader: Trained on real clips.

    Returns:
        The scores.
    """
    asked = np.array([caption.digit for caption in captions])
    cuts = follow_all(frames)
    digit = reader.predict(to_unit_length(cuts.mean(axis=1))) == asked
    alone = reader.predict(to_unit_length(cuts.reshape(-1, cuts.shape[-1])))
    direction = np.array(
        [
            read_direction(clip.max(axis=-1)) == caption.direction
            for clip, caption in zip(frames, captions, strict=True)
        ]
    )
    colour = np.array(
        [
            read_colour(clip) == caption.colour
            for clip, caption in zip(frames, captions, strict=True)
        ]
    )
    return Scores(
        clips=len(captions),
        digit=float(digit.mean()),
        single_frame=float((alone == asked.repeat(FRAMES)).mean()),
        direction=float(direction.mean()),
        colour=float(colour.mean()),
        all_three=float((digit & direction & colour).mean()),
    )


def generate(pipeline: WanPipeline, captions: Sequence[Caption], *, seed: int) -> np.ndarray:
    """Generate one clip a caption, each from a generator of its own.

    Args:
        pipeline: The exported model.
        captions: What to generate.
        seed: Seed of the first clip; the others follow.

    Returns:
        Frames `b f h w c` in [0, 1].
    """
    clips = []
    for first in tqdm(range(0, len(captions), BATCH), desc="generate"):
        part = captions[first : first + BATCH]
        generators = [
            torch.Generator().manual_seed(seed + first + index) for index in range(len(part))
        ]
        clips.append(
            pipeline(
                prompt=[caption.prompt for caption in part],
                height=SIZE,
                width=SIZE,
                num_frames=FRAMES,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                max_sequence_length=8,
                generator=generators,
            ).frames
        )
    return np.concatenate(clips)


@torch.no_grad()
def reconstruct(pipeline: WanPipeline, video: torch.Tensor) -> np.ndarray:
    """Encode and decode clips `b c f h w`; return frames `b f h w c`."""
    parts = [
        pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mode()).sample
        for part in torch.split(video, BATCH)
    ]
    return to_frames(torch.cat(parts))


def draw_sheet(
    frames: np.ndarray, *, columns: int = 8, shown: Sequence[int] = (0, 4, 8)
) -> Image.Image:
    """Draw clips `b f h w c` as a grid; each cell holds the first, middle and last frame."""
    gap = 2
    height, width = SIZE + gap, SIZE * len(shown) + 2 * gap
    sheet = np.full((-(-len(frames) // columns) * height, columns * width, 3), 64, dtype=np.uint8)
    for index, clip in enumerate(frames):
        strip = np.concatenate([clip[frame] for frame in shown], axis=1)
        top, left = index // columns * height, index % columns * width
        sheet[top : top + SIZE, left : left + strip.shape[1]] = np.round(strip * 255)
    return Image.fromarray(sheet)


def judge(folder: Path, *, seed: int = 0, sheet: Path | None = None) -> dict[str, Scores]:
    """Score the model, the real held-out clips and their reconstructions.

    Args:
        folder: Exported weights.
        seed: Seed of the first clip.
        sheet: Where to draw the judged clips.

    Returns:
        Scores by name: `generated`, `reconstructed` and `real`.
    """
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    reader = train_reader()
    captions = judged_captions()
    frames = generate(pipeline, captions, seed=seed)
    if sheet is not None:
        draw_sheet(frames).save(sheet, optimize=True)
    held_out = sample_clips(297, seed=1, held_out=True)
    return {
        "generated": score(frames, captions, reader),
        "reconstructed": score(reconstruct(pipeline, held_out.video), held_out.captions, reader),
        "real": score(to_frames(held_out.video), held_out.captions, reader),
    }


def report(scores: dict[str, Scores]) -> str:
    """Write scores as JSON, and one sentence after it."""
    made, real = scores["generated"], scores["real"]
    text = json.dumps({name: asdict(value) for name, value in scores.items()}, indent=2)
    return (
        f"{text}\nOf {made.clips} generated clips {made.digit:.1%} show the digit, "
        f"{made.direction:.1%} the direction and {made.colour:.1%} the colour that was asked for "
        f"(real held-out clips: {real.digit:.1%}, {real.direction:.1%}, {real.colour:.1%})."
    )


def main() -> None:
    """Judge from the command line: scores as JSON, then one sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="write the judged clips as a PNG")
    options = parser.parse_args()
    print(report(judge(options.weights, seed=options.seed, sheet=options.sheet)))


if __name__ == "__main__":
    main()

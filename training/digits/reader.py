"""Train the reader of digits that ships with the model: `python -m training.digits.reader`.

Two layers on the cut-out that `truestep.experiment.quality.digits_judge` follows, learned from real
clips of the training scans; the held-out scans are only read to state its accuracy. Half a minute
on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from training.digits.checkpoint import write_atomically
from training.digits.data import sample_clips
from truestep.experiment.quality.digits_judge import DIGIT_SIZE, READER, follow

HIDDEN = 64
CLIPS = 12_000
STEPS = 3_000
BATCH = 256
NOISE = 0.02
"""Added to the cut-outs: generated ink is rougher than rendered ink."""


def cut_outs(count: int, *, seed: int, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut-outs `n 256` of unit length and their digits `n`."""
    found, labels = [], []
    for first in range(0, count, 500):
        part = min(500, count - first)
        clips = sample_clips(part, seed=seed + first, held_out=held_out)
        frames = ((clips.video + 1) / 2).clamp(0, 1).numpy()
        found += [follow(clip.max(axis=0)) for clip in frames]
        labels += [caption.digit for caption in clips.captions]
    return torch.from_numpy(np.stack(found)).float(), torch.tensor(labels)


class Reader(torch.nn.Module):
    """The network."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(DIGIT_SIZE**2, HIDDEN)
        self.digit = torch.nn.Linear(HIDDEN, 10)

    def forward(self, cuts: torch.Tensor) -> torch.Tensor:
        """Logits `n 10` of cut-outs `n 256`."""
        logits: torch.Tensor = self.digit(torch.relu(self.hidden(cuts)))
        return logits


def train(*, seed: int = 0) -> Reader:
    """Train on real clips of the training scans."""
    torch.manual_seed(seed)
    cuts, labels = cut_outs(CLIPS, seed=50_000)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(0, len(cuts), (BATCH,))
        noisy = cuts[rows] + NOISE * torch.randn(BATCH, cuts.shape[1])
        loss = torch.nn.functional.cross_entropy(reader(noisy), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return reader


@torch.no_grad()
def accuracy(reader: Reader, cuts: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of cut-outs read right."""
    return float((reader(cuts).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Train, say how often it is right on training and held-out scans, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=READER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader = train()
    for parameter in reader.parameters():
        parameter.data = parameter.data.half().float()  # as it is written
    held_out = accuracy(reader, *cut_outs(297, seed=1, held_out=True))
    trained = accuracy(reader, *cut_outs(1_500, seed=90_000))
    print(json.dumps({"held_out": held_out, "training": trained}))
    state = {name: value.detach().half().numpy() for name, value in reader.state_dict().items()}
    write_atomically(options.output, lambda path: path.write_bytes(save(state)) and None)


if __name__ == "__main__":
    main()

"""CREPE (tiny) in torch, with the Keras weights: another layout, the same pitch tracker.

The architecture is that of Kim et al. 2018 (arXiv 1802.06182): six blocks of convolution, ReLU,
batch norm and pooling over 1,024 samples of 16 kHz sound, then 360 pitch bins of 20 cents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

FILTERS = (128, 16, 16, 16, 32, 64)
WIDTHS = (512, 64, 64, 64, 64, 64)
EPSILON = 1e-3


class Crepe(nn.Module):
    """Pitch salience of frames of sound, with one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, *FILTERS)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels[i], FILTERS[i], WIDTHS[i], stride=4 if i == 0 else 1)
            for i in range(len(FILTERS))
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(n, eps=EPSILON) for n in FILTERS)
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Salience of 360 bins.

        Args:
            frames: `b 1024`, float32, of zero mean and unit deviation.

        Returns:
            `b 360`, in [0, 1].
        """
        x = frames[:, None]
        for index, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = functional.pad(x, (254, 254) if index == 0 else (31, 32))
            x = functional.max_pool1d(norm(functional.relu(convolution(x))), 2)
        return torch.sigmoid(self.classifier(x.transpose(1, 2).flatten(1)))


def convert(keras: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The port's state dict of the Keras one: kernels are `width, in, out` there."""
    state = {}
    for index in range(len(FILTERS)):
        layer, norm = f"conv{index + 1}", f"conv{index + 1}-BN"
        own = f"convolutions.{index}"
        state[f"{own}.weight"] = keras[f"{layer}/{layer}_3/kernel:0"].permute(2, 1, 0)
        state[f"{own}.bias"] = keras[f"{layer}/{layer}_3/bias:0"]
        for theirs, ours in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ):
            state[f"norms.{index}.{ours}"] = keras[f"{norm}/{norm}_3/{theirs}:0"]
        state[f"norms.{index}.num_batches_tracked"] = torch.tensor(0)
    state["classifier.weight"] = keras["classifier/classifier_3/kernel:0"].T
    state["classifier.bias"] = keras["classifier/classifier_3/bias:0"]
    return state

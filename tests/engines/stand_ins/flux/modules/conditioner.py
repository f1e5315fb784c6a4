"""Text encoders."""

from __future__ import annotations

import torch


class HFEmbedder(torch.nn.Module):
    """Gives the text that it was made with."""

    def __init__(self, text: torch.Tensor) -> None:
        super().__init__()
        self.text = text

    def forward(self, text: list[str]) -> torch.Tensor:
        return self.text

"""A sentence encoder on ONNX Runtime, its matrices stored as int8 with a scale a channel."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch


class Encoder:
    """all-MiniLM-L6-v2 without PyTorch."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Hidden states `b l 384` of token ids `b l`."""
        feeds = {
            "input_ids": input_ids.numpy(),
            "attention_mask": attention_mask.numpy(),
            "token_type_ids": torch.zeros_like(input_ids).numpy(),
        }
        return {"last_hidden_state": torch.from_numpy(self.session.run(None, feeds)[0])}

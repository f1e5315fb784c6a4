"""silero-vad on ONNX Runtime: one window of sound at a time, state and context carried along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

RATE = 16_000
WINDOW, CONTEXT, HIDDEN = 512, 64, 128


class Detector:
    """Speech probability of a sound, window by window."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {item.name for item in self.session.get_inputs()}

    def __call__(self, sound: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run through a sound.

        Args:
            sound: `b samples`, float32 at 16 kHz, a multiple of 512.

        Returns:
            `probability` (`b windows`).
        """
        state = np.zeros((2, len(sound), HIDDEN), np.float32)
        context = np.zeros((len(sound), CONTEXT), np.float32)
        found = []
        for window in sound.numpy().reshape(len(sound), -1, WINDOW).transpose(1, 0, 2):
            chunk = np.concatenate([context, window], axis=1)
            feeds = {"input": chunk, "state": state, "sr": np.array(RATE)}
            known = {name: value for name, value in feeds.items() if name in self.inputs}
            output, state = self.session.run(None, known)
            context = chunk[:, -CONTEXT:]
            found.append(torch.from_numpy(output))
        return {"probability": torch.cat(found, dim=1)}

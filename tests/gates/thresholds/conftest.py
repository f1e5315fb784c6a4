"""Threshold files for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gates.thresholds.samples import FRAMES, WAVEFORM

Save = Callable[..., Path]


@pytest.fixture
def reference() -> dict[str, torch.Tensor]:
    """What a model of video and sound decoded."""
    return {"video/frames": FRAMES, "audio/waveform": WAVEFORM}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a threshold file of these cases and other keys."""

    def save(cases: dict[str, Any], name: str = "h100.json", **others: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cases": cases, **others}))
        return path

    return save

"""Fixtures of the parity tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_API_KEY", "CI"):
        monkeypatch.delenv(name, raising=False)

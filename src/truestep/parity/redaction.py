"""Access tokens never reach a file, a message or a report."""

from __future__ import annotations

import os
import re

TOKENS = ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_API_KEY")
"""Environment variables whose values are secret."""

_SHAPE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SHORTEST = 6


def redact(text: str) -> str:
    """Replace every access token in a text, of the environment or of Hugging Face's form."""
    for name in TOKENS:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"<{name}>")
    return _SHAPE.sub("<token>", text)

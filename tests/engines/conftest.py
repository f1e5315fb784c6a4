"""Tiny pipelines of several classes, and a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from truestep.testing import tiny
from truestep.testing.tiny.calls import picture


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `flux`, `sd`, `wan` and `cat.png`."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save("FluxPipeline", folder / "flux")
    tiny.save("StableDiffusionImg2ImgPipeline", folder / "sd")
    tiny.save("WanImageToVideoPipeline", folder / "wan")
    picture(0).save(folder / "cat.png")
    return folder

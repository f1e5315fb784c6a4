"""A realistic comparison to render, and a browser to look at the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from truestep.judge.media import frame_media
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.verdict import Comparison, Cost, Difference, GateResult, Side

if TYPE_CHECKING:
    from selenium import webdriver

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def make(*, prompt: str = "a red three moving left", drifted: bool = True) -> Comparison:
    """A 20-step check of which guidance drifted, with frames and another gate."""
    torch.manual_seed(0)
    reference = {"text/cond": torch.randn(1, 8, 16), "latent/initial": torch.randn(1, 4, 3, 8, 8)}
    for step in range(20):
        reference[f"step/{step:04d}/guided"] = torch.randn(1, 4, 3, 8, 8)
        if step in (0, 10, 19):
            reference[f"step/{step:04d}/cond"] = torch.randn(1, 4, 3, 8, 8)
    factor = 1.01 if drifted else 1 + 2e-7
    actual = {n: t * factor if n.endswith("guided") else t.clone() for n, t in reference.items()}
    frames = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    others = (frames + 0.01 * torch.randn_like(frames)).clamp(-1, 1)
    return build_comparison(
        compare_tensors(actual, reference),
        actual=Side(label="guidance_scale=3.1", environment={"library.torch": "2.14"}),
        reference=Side(label="reference", path="refs/a.safetensors"),
        case_id="digits-a-red-three-0123456789ab",
        case={
            "model": "builtin:digits",
            "revision": None,
            "prompt": prompt,
            "seed": 0,
            "steps": 20,
            "dtype": "float32",
        },
        environment_differences=(Difference(key="library.torch", actual="2.14", reference="2.13"),),
        looked_at=("text", "guidance at every step"),
        not_looked_at=("accumulation over a free run",),
        gates=(
            GateResult(
                name="fastvideo-latent/1",
                passed=True,
                metrics={"full_cosine_distance": 1e-3},
                thresholds={"full_cosine": 1e-2},
            ),
        ),
        cost=Cost(forwards=6, forwards_generation=40, seconds=0.1),
        media=(frame_media(others, frames, name="video/frames"),),
        notes=("both sides were decoded by one VAE",),
        repeat="truestep check three --set guidance_scale=3.1",
    )


@pytest.fixture(scope="session")
def drifted() -> Comparison:
    """A drifted check."""
    return make()


@pytest.fixture(scope="session")
def equivalent() -> Comparison:
    """A check that passed."""
    return make(drifted=False)


@pytest.fixture(scope="session")
def hostile() -> Comparison:
    """A check whose prompt attacks the page."""
    return make(prompt="</script><script>alert(1)</script><img src=x onerror=alert(1)> & \u2028")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium of the system."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        message = (
            "chromium or chromedriver is not installed: "
            "`apt-get install chromium chromium-driver` (Debian) gets both"
        )
        if os.environ.get("TRUESTEP_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()

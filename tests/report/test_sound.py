"""Sound in the reports: told in the terminal, played and shown on the page."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from truestep.judge.media import frame_media, sound_media
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.report.html import render, write_many
from truestep.report.terminal import lines
from truestep.verdict import Comparison, Results, Side

RATE = 24_000


def make(*, gain: float = 1.01, seconds: float = 1.0) -> Comparison:
    """A check of an audio-video model whose sound drifted."""
    torch.manual_seed(0)
    frames = torch.rand(1, 3, 3, 16, 16) * 2 - 1
    times = torch.arange(RATE) / RATE
    waveform = (torch.sin(2 * math.pi * (300 + 1500 * times) * times) * 0.4).expand(1, 2, -1)
    reference = {"text/cond": torch.randn(1, 8, 16)}
    for step in range(4):
        reference[f"step/{step:04d}/cond"] = torch.randn(1, 16, 8)
        reference[f"audio/step/{step:04d}/cond"] = torch.randn(1, 10, 4)
    reference |= {"video/frames": frames, "audio/waveform": waveform.clone()}
    actual = {
        name: tensor * gain if name in {"audio/step/0002/cond", "audio/waveform"} else tensor
        for name, tensor in reference.items()
    }
    actual["audio/waveform"] = actual["audio/waveform"][..., : round(seconds * RATE)]
    return build_comparison(
        compare_tensors(actual, reference),
        actual=Side(label="candidate"),
        reference=Side(label="reference"),
        sample_rate=RATE,
        media=(
            frame_media(frames, frames, name="video/frames"),
            sound_media(
                actual["audio/waveform"],
                reference["audio/waveform"],
                name="audio/waveform",
                sample_rate=RATE,
            ),
        ),
    )


@pytest.fixture(scope="module")
def drifted() -> Comparison:
    return make()


def block(text: str) -> str:
    found = re.search(r'<section class="sound"[^>]*>.*?</section>', text, re.S)
    assert found is not None
    return found.group()


def test_the_terminal_tells_both_modalities_and_the_sound(drifted: Comparison) -> None:
    text = "\n".join(lines(drifted))
    assert "  video        identical, 5 of 5 pass\n" in text
    assert re.search(r"\n  audio        drifted, 3 of 5 pass, worst \S+ x floor \(audio/", text)
    assert "sound        rel_l2 0.01, correlation 1, level +0.0864 dB, spectrum 0.0" in text
    assert "peak 0.404 (was 0.4), 1 s " in re.sub(r"\s+", " ", text)
    assert "prediction (audio) 3 of 4 pass" in text
    assert "prediction (video) 4 of 4 pass" in text
    assert drifted.sentence.endswith("; audio only: video is identical")


def test_another_length_in_the_terminal() -> None:
    text = "\n".join(lines(make(seconds=0.5)))
    assert "0.5 s of sound against 1 s (-12,000 samples at 24,000 Hz)" in text
    sound = re.sub(r"\s+", " ", text[text.index("  sound ") :])
    assert sound.startswith(" sound level +")
    assert "0.5 s (was 1 s)" in sound


def test_silence_in_the_terminal() -> None:
    text = re.sub(r"\s+", " ", "\n".join(lines(make(gain=0.0))))
    assert "level -inf dB, spectrum inf dB" in text
    assert "the actual side is silent" in text


def test_the_page_has_both_sounds_and_three_pictures(drifted: Comparison) -> None:
    text = render([drifted])
    part = block(text)
    sound = drifted.media[1].sound
    assert sound is not None
    assert sound.spectrograms is not None
    sounds = re.findall(
        r'<audio controls preload="metadata" aria-label="(\w+)" src="([^"]*)"', part
    )
    assert sounds == [
        ("candidate", sound.actual),
        ("reference", sound.reference),
        ("difference", sound.difference),
    ]
    assert sound.difference_gain == 128.0  # the largest difference is 0.004
    assert "128 times as loud" in part
    assert part.count('class="wave"') == 3
    pictures = re.findall(r'<img [^>]*src="([^"]*)"', part)
    shown = sound.spectrograms
    assert pictures == [shown.actual, shown.reference, shown.difference]
    assert "media-src data:;" in text
    assert "Decoded sound" in part
    assert "24,000 Hz" in part
    assert "0 to 12 kHz" in part
    assert "+0.0864 dB" in part
    assert "the first" not in part
    order = ["sentence", "case", "differences", "failing", "modalities", "curve", "frames", "sound"]
    assert re.findall(r'<section class="(\w+)"', text)[: len(order)] == order


def test_the_page_tells_the_modalities_apart(drifted: Comparison) -> None:
    text = render([drifted])
    told = re.findall(r"</span> (\w+)</span> <b>(\w+)</b> (\d of \d) tensors pass", text)
    assert told == [("identical", "video", "5 of 5"), ("drifted", "audio", "3 of 5")]
    assert "</svg>prediction cond (video)</li>" in text
    assert "</svg>prediction cond (audio)</li>" in text


def test_what_cannot_be_measured_is_said() -> None:
    part = block(render([make(seconds=0.5)]))
    assert part.count("not measured") == 4
    assert "duration <b>0.5 s</b> (was 1 s)" in part


def test_the_embedded_json_keeps_the_numbers(drifted: Comparison) -> None:
    text = render([drifted])
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    assert "base64" not in found.group(1)
    (comparison,) = Results.model_validate(json.loads(found.group(1))).comparisons
    (media,) = comparison.media
    assert media.sound is not None
    assert drifted.media[1].sound is not None
    assert media.sound.metrics == drifted.media[1].sound.metrics
    assert comparison.modalities == drifted.modalities
    assert 'class="sound"' in render([comparison])


def test_rendered_from_the_json_alone(drifted: Comparison) -> None:
    for comparison in (drifted, make(seconds=0.5), make(gain=0.0), make(gain=math.nan)):
        again = Comparison.model_validate_json(comparison.to_json())
        assert render([again]) == render([comparison])


def open_report(browser: webdriver.Chrome, path: Path, comparison: Comparison) -> None:
    write_many(path, [comparison])
    browser.get_log("browser")
    browser.get(path.as_uri())


PLAY = """
const done = arguments[arguments.length - 1];
const sounds = [...document.querySelectorAll(".sound audio")];
const read = async (sound) => {
  if (sound.readyState < 1)
    await new Promise((ok, no) => { sound.onloadedmetadata = ok; sound.onerror = no; });
  sound.muted = true;
  await sound.play();
  sound.pause();
  return { seconds: sound.duration, controls: sound.controls, volume: sound.volume };
};
Promise.all(sounds.map(read)).then(done, (error) => done(String(error)));
"""


def test_a_browser_plays_both_sounds(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    open_report(browser, tmp_path / "r.html", drifted)
    browser.find_element(By.CSS_SELECTOR, ".sound h3").click()  # no sound before the first click
    browser.set_script_timeout(20)
    found: Any = browser.execute_async_script(PLAY)
    assert [sound["seconds"] for sound in found] == [pytest.approx(1, abs=1e-3)] * 3
    assert all(sound["controls"] and sound["volume"] == 1 for sound in found)
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.sound img')].map(i => [i.naturalWidth, "
        "i.naturalHeight])"
    )
    assert sizes == [[RATE // 256 + 1, 256]] * 3
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_the_sound_fits_and_follows_the_colour_scheme(
    scheme: str, width: int, browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    open_report(browser, tmp_path / "r.html", drifted)
    overflow = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0
    sound = browser.find_element(By.CSS_SELECTOR, ".sound audio")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", sound)
    assert sound.is_displayed()
    with Image.open(io.BytesIO(sound.screenshot_as_png)) as image:
        shade = np.median(np.asarray(image.convert("L")))
    assert (shade > 128) == (scheme == "light")
    inside = browser.execute_script(
        "const box = arguments[0].getBoundingClientRect();"
        "const own = arguments[0].closest('figure').getBoundingClientRect();"
        "return box.left >= own.left - 1 && box.right <= own.right + 1",
        sound,
    )
    assert inside

"""The report in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from truestep.report.html import write_many
from truestep.verdict import Comparison

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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium of the system."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        message = "chromium or chromedriver is not installed"
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


def open_report(browser: webdriver.Chrome, path: Path, *comparisons: Comparison) -> None:
    write_many(path, comparisons)
    browser.get_log("browser")
    browser.get(path.as_uri())


def test_the_scrubber_moves_all_three_images(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    open_report(browser, tmp_path / "r.html", drifted)

    def shown() -> list[str]:
        images = browser.find_elements(By.CSS_SELECTOR, ".triple img")
        return [str(i.get_attribute("src")) for i in images if i.is_displayed()]

    first = shown()
    assert len(first) == 3
    scrubber = browser.find_element(By.CSS_SELECTOR, ".scrub input")
    scrubber.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.find_element(By.CSS_SELECTOR, ".scrub output").text == "frame 2"
    second = shown()
    assert len(second) == 3
    assert all(a != b for a, b in zip(first, second, strict=True))
    natural = browser.execute_script(
        "return [...document.querySelectorAll('.triple img')].map(i => i.naturalWidth)"
    )
    assert set(natural) == {16}
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_a_hostile_prompt_does_nothing(
    browser: webdriver.Chrome, hostile: Comparison, tmp_path: Path
) -> None:
    open_report(browser, tmp_path / "r.html", hostile)
    assert browser.find_elements(By.CSS_SELECTOR, "img[src='x']") == []
    assert "alert(1)" in browser.find_element(By.CSS_SELECTOR, ".prompt").text
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_it_fits_and_follows_the_colour_scheme(
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
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background[4:-1].split(",")) / 3
    assert (brightness > 128) == (scheme == "light")


def test_the_download_is_the_json(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    open_report(browser, tmp_path / "r.html", drifted)
    text = browser.execute_async_script(
        "const done = arguments[0];"
        "fetch(document.getElementById('download').href).then(r => r.json())"
        ".then(j => done(j.verdict), e => done(String(e)));"
    )
    assert text == drifted.verdict.value

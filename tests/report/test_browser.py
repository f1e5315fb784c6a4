"""The report in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from truestep.report.html import write_many
from truestep.verdict import Comparison, Results


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
    picture = tmp_path / f"{scheme}-{width}.png"
    assert browser.save_screenshot(str(picture))
    with Image.open(picture) as image:
        corner = image.convert("L").getpixel((1, 1))
    assert isinstance(corner, int)
    assert (corner > 128) == (scheme == "light")
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background[4:-1].split(",")) / 3
    assert (brightness > 128) == (scheme == "light")


def test_the_download_is_the_json(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    open_report(browser, tmp_path / "r.html", drifted)
    link = browser.find_element(By.ID, "download")
    browser.execute_script("arguments[0].scrollIntoView()", link)
    link.click()
    file = folder / "truestep.json"
    WebDriverWait(browser, 20).until(lambda _: file.exists())
    results = Results.model_validate_json(file.read_text("utf-8"))
    assert results.comparisons[0] == drifted.model_copy(update={"media": ()})


def test_it_reads_without_javascript(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_report(browser, tmp_path / "r.html", drifted)
        images = browser.find_elements(By.CSS_SELECTOR, ".triple img")
        assert len(images) == 27
        assert all(image.is_displayed() for image in images)
        assert not browser.find_element(By.CSS_SELECTOR, ".scrub").is_displayed()
        assert not browser.find_element(By.ID, "download").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_rest_of_the_failing_rows_opens(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    failing = [*drifted.failing] * 2
    open_report(browser, tmp_path / "r.html", drifted.model_copy(update={"rows": failing}))
    link = browser.find_element(By.CSS_SELECTOR, "a[href='#all1']")
    browser.execute_script("arguments[0].scrollIntoView()", link)
    link.click()
    rows = browser.find_elements(By.CSS_SELECTOR, ".all tbody tr")
    assert len(rows) == len(failing)
    assert rows[0].is_displayed()


def test_words_of_a_note_are_not_broken_beside_long_names(
    browser: webdriver.Chrome, drifted: Comparison, tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 800, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    rows = tuple(
        row.model_copy(
            update={
                "name": f"module/single_blocks.{at}.norm.norm.{'long' * 12}/0/cond/out.0",
                "origin": "introduced",
                "note": "",
            }
        )
        for at, row in enumerate(drifted.rows)
    )
    open_report(browser, tmp_path / "r.html", drifted.model_copy(update={"rows": rows}))
    lines = browser.execute_script(
        "return [...document.querySelectorAll('.rows td:last-child')]"
        ".filter(cell => cell.textContent === 'introduced').map(cell => {"
        "const range = document.createRange(); range.selectNodeContents(cell);"
        "return range.getClientRects().length})"
    )
    assert set(lines) == {1}  # boxes of text: one a line
    overflow = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0

"""The pages of `ab` and `perf show` in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.experiment.test_baseline import COHORT, make_batches
from tests.experiment.test_table import Made
from truestep.experiment.perf_records import Cohort
from truestep.experiment.records import Experiment
from truestep.report import trend
from truestep.report.ab import COLUMNS, write_tables

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """A finished experiment, and its page."""
    folder = tmp_path_factory.mktemp("ab")
    made = Made(folder / "results").time(20, candidate=0.8).check(off=0.01)
    found = made.result()
    write_tables(made.store, found, report=folder / "ab.html")
    return found, folder / "ab.html"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a history: six batches of one cohort, then one after an upgrade."""
    batches = [
        batch.model_copy(update={"started": f"2026-01-0{at + 1}T00:00:00", "label": f"day {at}"})
        for at, batch in enumerate(make_batches(7, 8))
    ]
    upgraded = Cohort(case_id=COHORT.case_id, values={**COHORT.values, "library.torch": HOSTILE})
    cohorts = [(COHORT, batches[:6]), (upgraded, batches[6:])]
    path = tmp_path_factory.mktemp("perf") / "trend.html"
    trend.write(path, trend.build(cohorts, history="perf.sqlite"))
    return path


def open_page(browser: webdriver.Chrome, path: Path) -> None:
    browser.get_log("browser")
    browser.get(path.as_uri())


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the console says of errors, refused scripts and things not loaded among them."""
    return [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def overflow(browser: webdriver.Chrome) -> int:
    """Pixels by which the page is wider than the window."""
    found = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert isinstance(found, int)
    return found


def look(browser: webdriver.Chrome, *, scheme: str = "light", width: int = 1280) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )


def brightness(browser: webdriver.Chrome) -> float:
    """Of the page's background, 0 to 255."""
    found = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in found[4:-1].split(",")) / 3


def test_the_scrubber_of_ab_moves_both_arms_and_their_difference(
    browser: webdriver.Chrome, experiment: tuple[Experiment, Path]
) -> None:
    open_page(browser, experiment[1])

    def shown() -> dict[str, str]:
        figures = browser.find_elements(By.CSS_SELECTOR, ".triple figure")
        return {
            f.text.partition(",")[0]: str(f.find_element(By.TAG_NAME, "img").get_attribute("src"))
            for f in figures
            if f.is_displayed()
        }

    first = shown()
    assert [name.split()[0] for name in first] == ["candidate", "baseline", "difference"]
    scrubber = browser.find_element(By.CSS_SELECTOR, ".scrub input")
    scrubber.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.find_element(By.CSS_SELECTOR, ".scrub output").text == "frame 2"
    second = shown()
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)
    natural = browser.execute_script(
        "return [...document.querySelectorAll('.triple img')].map(i => i.naturalWidth)"
    )
    assert set(natural) == {16}
    assert complaints(browser) == []


def test_the_table_of_ab_is_there_and_leads_to_its_cell(
    browser: webdriver.Chrome, experiment: tuple[Experiment, Path]
) -> None:
    found, path = experiment
    look(browser)
    open_page(browser, path)
    heads = browser.find_elements(By.CSS_SELECTOR, "section.table th")
    assert [head.text for head in heads] == list(COLUMNS)
    cells = browser.find_elements(By.CSS_SELECTOR, "section.table tbody td")
    assert len(cells) == len(COLUMNS)
    assert cells[1].text == found.verdict.value
    link = cells[0].find_element(By.TAG_NAME, "a")
    target = str(link.get_attribute("href")).partition("#")[2]
    assert found.cells[0].cell.name in browser.find_element(By.ID, target).text
    browser.find_element(By.CSS_SELECTOR, "details summary").click()
    runs = browser.find_elements(By.CSS_SELECTOR, "details tbody tr")
    assert len(runs) == len(found.cells[0].samples) == 120
    assert runs[0].is_displayed()
    assert complaints(browser) == []


def test_the_download_of_ab_is_the_result(
    browser: webdriver.Chrome, experiment: tuple[Experiment, Path], tmp_path: Path
) -> None:
    found, path = experiment
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    open_page(browser, path)
    link = browser.find_element(By.ID, "download")
    browser.execute_script("arguments[0].scrollIntoView()", link)
    link.click()
    file = tmp_path / "truestep-ab.json"
    WebDriverWait(browser, 20).until(lambda _: file.exists())
    assert Experiment.model_validate_json(file.read_text("utf-8")) == found


def test_ab_reads_without_javascript(
    browser: webdriver.Chrome, experiment: tuple[Experiment, Path]
) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, experiment[1])
        images = browser.find_elements(By.CSS_SELECTOR, ".triple img")
        assert len(images) == 15
        assert all(image.is_displayed() for image in images)
        assert not browser.find_element(By.CSS_SELECTOR, ".scrub").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_trend_is_drawn_with_every_batch_in_the_table(
    browser: webdriver.Chrome, history: Path
) -> None:
    look(browser)
    open_page(browser, history)
    charts = browser.find_elements(By.CSS_SELECTOR, "section.curve")
    titles = [chart.find_element(By.TAG_NAME, "h3").text for chart in charts]
    names = [title.partition(",")[0].lower() for title in titles]
    assert names == ["whole generation", "denoise", "decode", "memory"]
    for chart in charts:
        drawing = chart.find_element(By.TAG_NAME, "svg")
        assert drawing.size["width"] > 100
        assert len(drawing.find_elements(By.TAG_NAME, "circle")) == 7
        assert len(drawing.find_elements(By.CSS_SELECTOR, ".change")) == 1
    rows = browser.find_elements(By.CSS_SELECTOR, ".wide tbody tr:not(.change-row)")
    assert [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows] == [
        f"day {day}" for day in range(7)
    ]
    change = browser.find_element(By.CSS_SELECTOR, ".change-row")
    assert "another cohort: library.torch" in change.text
    assert HOSTILE in change.text
    assert browser.find_elements(By.CSS_SELECTOR, "img[src='x'], script") == []
    assert complaints(browser) == []


@pytest.mark.parametrize("page", ["ab", "trend"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_they_fit_and_follow_the_colour_scheme(
    page: str,
    scheme: str,
    width: int,
    browser: webdriver.Chrome,
    experiment: tuple[Experiment, Path],
    history: Path,
) -> None:
    look(browser, scheme=scheme, width=width)
    open_page(browser, experiment[1] if page == "ab" else history)
    assert overflow(browser) <= 0
    assert (brightness(browser) > 128) == (scheme == "light")

"""Every kind of page at the width of a phone, a tablet and a desk, and what its controls do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.experiment.test_baseline import COHORT, make_batches
from tests.experiment.test_table import Made
from tests.report.conftest import make
from tests.report.results_to_show import HOSTILE, everything, hostile
from tests.report.test_browser_experiments import complaints, look, open_page, overflow
from tests.report.test_sound import make as make_sound
from truestep import compare, compare_weights
from truestep.experiment.ablation_records import EndDistance, EndRun, Matrix, MatrixCell
from truestep.report import ablation, trend
from truestep.report.ab import write_tables
from truestep.report.html import write_many
from truestep.verdict import Comparison, GateResult, Verdict

LONG = "a_name_without_any_place_to_break_it_" * 12


def steps() -> Comparison:
    """Two runs that part at step 2, with a picture a step."""
    drawn = torch.Generator().manual_seed(0)
    reference = {f"step/{at:04d}/cond": torch.randn(1, 4, 8, 8, generator=drawn) for at in range(6)}
    actual = {name: tensor.clone() for name, tensor in reference.items()}
    for name in list(actual)[2:]:
        actual[name][:, 1] += 0.5
    found = compare(actual, reference)
    both = (*found.media, *make().media)
    return found.model_copy(update={"case_id": LONG, "media": both})


def weights() -> Comparison:
    names = [f"transformer_blocks.{at}.attn.to_out.0.weight" for at in range(40)]
    reference = {name: torch.randn(4, 4) for name in names}
    return compare_weights({n: t * 1.5 for n, t in reference.items()}, reference)


def gate() -> Comparison:
    results = tuple(
        GateResult(
            name=f"{LONG}/{at}",
            passed=passed,
            metrics={LONG: 1e-3, "psnr_db": 31.2},
            thresholds={LONG: 1e-2},
            note=LONG,
            not_judged=(LONG,),
        )
        for at, passed in enumerate((True, False, None))
    )
    return make().model_copy(update={"gates": results})


def matrix() -> Matrix:
    names = tuple(f"official@{at}f4b06fb" for at in range(6))
    end = EndDistance(
        modality="video", verdict=Verdict.DRIFTED, rel_l2=0.1, floor=1e-6, multiple=1e5
    )
    run = EndRun(controls=(), verdict=Verdict.DRIFTED, ends=(end,))
    cells = tuple(
        MatrixCell(reference=a, candidate=b, run=run) for a in names for b in names if a != b
    )
    return Matrix(
        sentence=f"{len(names)} profiles, {LONG}", case_id=LONG, case={"prompt": HOSTILE},
        profiles=names, cells=cells, environment={LONG: LONG},
    )  # fmt: skip


def _of(*comparisons: Comparison) -> Callable[[Path], None]:
    return lambda path: write_many(path, comparisons)


def _ab(path: Path) -> None:
    made = Made(path.parent / "ab-results").time(20, candidate=0.8).check(off=0.01)
    write_tables(made.store, made.result(), report=path)


def _trend(path: Path) -> None:
    batches = [
        batch.model_copy(update={"started": f"2026-01-0{at + 1}T00:00:00", "label": LONG})
        for at, batch in enumerate(make_batches(6, 8))
    ]
    trend.write(path, trend.build([(COHORT, batches)], history=LONG))


PAGES: dict[str, Callable[[Path], None]] = {
    "check": _of(make()),
    "several": _of(*everything().comparisons),
    "hostile": _of(hostile()),
    "steps": _of(steps()),
    "sound": _of(make_sound()),
    "weights": _of(weights()),
    "gate": _of(gate()),
    "nothing": _of(),
    "ab": _ab,
    "matrix": lambda path: ablation.write_files(matrix(), output=None, report=path),
    "trend": _trend,
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, write in PAGES.items():
        write(folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_no_page_scrolls_sideways(browser: webdriver.Chrome, pages: Path, name: str) -> None:
    for width in (390, 800, 1280):
        for scheme in ("light", "dark"):
            look(browser, width=width, scheme=scheme)
            open_page(browser, pages / f"{name}.html")
            for details in browser.find_elements(By.CSS_SELECTOR, "details"):
                browser.execute_script("arguments[0].open = true", details)
            assert overflow(browser) <= 0, f"{width} {scheme}"
            inner = browser.execute_script(
                "return [document.scrollingElement.scrollWidth, window.innerWidth]"
            )
            assert inner[0] <= inner[1], f"{width} {scheme}"
            assert complaints(browser) == []


def shown(browser: webdriver.Chrome, axis: str) -> list[str]:
    """What is under the pictures that are to be seen."""
    figures = browser.find_elements(By.CSS_SELECTOR, f".frames[data-axis={axis}] figure")
    return [f.text for f in figures if f.is_displayed() and f.text]


def choose(browser: webdriver.Chrome, view: str) -> None:
    radio = browser.find_element(By.CSS_SELECTOR, f".look input[value={view}]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", radio)
    radio.click()


def test_one_bar_moves_steps_and_frames_apart(browser: webdriver.Chrome, pages: Path) -> None:
    look(browser)
    open_page(browser, pages / "steps.html")
    step, frame = browser.find_elements(By.CSS_SELECTOR, ".scrub input")
    assert (step.get_attribute("aria-label"), frame.get_attribute("aria-label")) == (
        "step",
        "frame",
    )
    assert step.get_attribute("aria-valuetext") == "step 2"  # where they part
    step.send_keys(Keys.HOME)
    assert shown(browser, "step")[0] == "candidate, step 0"
    step.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert step.get_attribute("aria-valuetext") == "step 2"
    assert shown(browser, "step")[0] == "candidate, step 2"
    assert shown(browser, "frame")[0] == "candidate, frame 0"
    frame.send_keys(Keys.ARROW_RIGHT)
    assert shown(browser, "step")[0] == "candidate, step 2"
    assert shown(browser, "frame")[0] == "candidate, frame 1"
    section = browser.find_element(By.CSS_SELECTOR, ".frames[data-axis=step]")
    section.send_keys(Keys.ARROW_LEFT)
    assert shown(browser, "step")[0] == "candidate, step 1"
    line = browser.find_element(By.CSS_SELECTOR, ".curve .cursor").get_attribute("d")
    step.send_keys(Keys.END)
    assert browser.find_element(By.CSS_SELECTOR, ".curve .cursor").get_attribute("d") != line
    assert complaints(browser) == []


def test_blink_flips_with_the_space_bar(browser: webdriver.Chrome, pages: Path) -> None:
    look(browser)
    open_page(browser, pages / "check.html")
    choose(browser, "blink")
    browser.find_element(By.CSS_SELECTOR, ".blinking input").click()  # no longer by itself
    section = browser.find_element(By.CSS_SELECTOR, ".frames")
    seen = []
    for _ in range(3):
        (text,) = shown(browser, "frame")
        seen.append(text)
        section.send_keys(Keys.SPACE)
    assert seen[0] != seen[1]
    assert seen[0] == seen[2]
    assert {text.partition(",")[0] for text in seen} == {"candidate", "reference"}
    button = browser.find_element(By.CSS_SELECTOR, ".blinking button")
    before = button.text
    button.click()
    assert button.text != before


def test_blink_flips_by_itself_unless_motion_is_unwanted(
    browser: webdriver.Chrome, pages: Path
) -> None:
    open_page(browser, pages / "check.html")
    choose(browser, "blink")
    wait = "const m = document.querySelector('.media'), done = arguments[0], was = m.dataset.side;"
    wait += "setTimeout(() => done(was !== m.dataset.side), 900)"
    browser.set_script_timeout(20)
    assert browser.execute_async_script(wait)
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(browser, pages / "check.html")
    choose(browser, "blink")
    assert not browser.execute_async_script(wait)
    look(browser)


def test_difference_and_swipe_show_what_they_say(browser: webdriver.Chrome, pages: Path) -> None:
    look(browser, width=390)
    open_page(browser, pages / "check.html")
    choose(browser, "difference")
    assert shown(browser, "frame") == ["difference × 32"]
    choose(browser, "swipe")
    assert {text.partition(",")[0] for text in shown(browser, "frame")} == {
        "candidate",
        "reference",
    }
    clip = "return getComputedStyle(document.querySelector('.a img')).clipPath"
    before = browser.execute_script(clip)
    browser.find_element(By.CSS_SELECTOR, ".wipe input").send_keys(Keys.HOME)
    assert browser.execute_script(clip) != before
    choose(browser, "side")
    assert len(shown(browser, "frame")) == 3
    assert browser.execute_script(clip) == "none"
    assert complaints(browser) == []


def test_one_time_moves_players_cursor_and_frames(browser: webdriver.Chrome, pages: Path) -> None:
    look(browser)
    open_page(browser, pages / "sound.html")
    browser.set_script_timeout(20)
    browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.querySelectorAll('audio')].map("
        "a => a.readyState ? 0 : new Promise(ok => a.onloadedmetadata = ok))).then(() => done())"
    )
    time = browser.find_element(By.CSS_SELECTOR, ".time input")
    time.send_keys(Keys.END)
    times = browser.execute_script(
        "return [...document.querySelectorAll('audio')].map(a => a.currentTime)"
    )
    assert times == [pytest.approx(1.0, abs=0.01)] * 3
    assert browser.find_element(By.CSS_SELECTOR, ".time output").text == "1.00 s"
    assert shown(browser, "frame")[0] == "candidate, frame 2"
    now, seen = (browser.find_element(By.CSS_SELECTOR, f".{name}").rect for name in ("now", "seen"))
    assert now["x"] == pytest.approx(seen["x"] + seen["width"], abs=3)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".wave")) == 3
    assert complaints(browser) == []

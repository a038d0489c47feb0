"""A page with a finished comparison and a benchmark to show, and a browser to see it with."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import small_run

from dense_shortcuts.bench import report
from dense_shortcuts.bench.measure import Result, Row
from dense_shortcuts.bench.run import RESULTS

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: small/identity, small/stage-group and a benchmark with figures that are given, not measured."""
    folder = tmp_path_factory.mktemp("demo")
    small_run(folder)
    rows = [
        Row(name, 23_000_000, {"train": [step, 1.1 * step], "infer": [step / 4, step / 3]}, {"train": 9}, peak)
        for name, step, peak in (("timm.resnet50", 1.0, 100), ("dsnet50-batch", 1.1, 103), ("public_dsnet50", 1.3, 131))
    ]
    result = Result("depth 50", "eager", "timm.resnet50", (8, 3, 128, 128), None, rows, {})
    (folder / "runs" / "bench").mkdir()
    figures = {"comparisons": [report.as_json(result)]}
    (folder / "runs" / "bench" / RESULTS).write_text(json.dumps(figures))
    return folder / "runs"


@pytest.fixture(scope="session")
def address(runs) -> Iterator[str]:
    """The page, served."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dense_shortcuts.demo.app import serve

    page, where = serve(runs, None, wait=False)
    yield where
    page.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Debian's chromium under Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"no browser at {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, address):
    """Opens the page at a width; asks of other servers, and errors of the page, fail the test."""
    opened, strangers, errors = [], [], []

    def open_tab(width: int = 1200, height: int = 900):
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)  # milliseconds, for machines under load: nothing waits so long by itself
        opened.append(page)
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or strangers.append(r.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Compare").wait_for()
        return page

    yield open_tab
    for page in opened:
        page.close()
    assert strangers == [] and errors == []


@pytest.fixture
def shoot():
    """Saves a picture of the page as docs/screenshots has them, where SCREENSHOTS names a folder."""

    def save(page, name: str) -> None:
        folder = os.environ.get("SCREENSHOTS")
        if folder is not None:
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True, animations="disabled")

    return save


@pytest.fixture
def digit(tmp_path) -> Path:
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[13] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(tmp_path / "three.png")
    return tmp_path / "three.png"

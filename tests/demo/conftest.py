"""A page with a finished comparison and a benchmark to show, and a browser to see it with."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import small_run

from dense_shortcuts.experiments.bench import report
from dense_shortcuts.experiments.bench.measure import Result, Row
from dense_shortcuts.experiments.bench.run import RESULTS

CHROMIUM = Path("/usr/bin/chromium")
# Ratios to ResNet-50 of a training step and of inference, the least, the median and the greatest, and MiB of a step.
RATIOS = (
    ("timm.resnet50", (1, 1, 1), (1, 1, 1), 475),
    ("dsnet50/group/native", (0.90, 0.909, 0.92), (0.90, 0.926, 0.93), 490),
    ("dsnet50/batch/native", (0.90, 0.917, 0.92), (0.90, 0.941, 0.97), 490),
    ("public_dsnet50", (0.80, 0.816, 0.84), (0.83, 0.844, 0.86), 621),
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: small/identity, small/stage-auto and a benchmark with the figures of benchmarks/RESULTS.md."""
    folder = tmp_path_factory.mktemp("demo")
    small_run(folder)
    step, infer = 8 / 18.8, 8 / 62.7
    rows = [
        Row(name, 25_600_000, {"train": [step / r for r in train], "infer": [infer / r for r in call]}, {}, peak)
        for name, train, call, peak in RATIOS
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
    from dense_shortcuts.experiments.demo.app import serve

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
            path = Path(folder) / f"{name}.png"
            page.screenshot(path=path, full_page=True, animations="disabled")
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a photograph needs 350 kB else

    return save


@pytest.fixture
def digit(tmp_path) -> Path:
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[13] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(tmp_path / "three.png")
    return tmp_path / "three.png"

"""The hooks of the documentation site: which pages come where, and that nothing is loaded from elsewhere."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def test_pages_that_are_there_come_in_order_and_unknown_ones_at_the_end():
    nav = hooks.navigation(["deploy.md", "new.md", "index.md", "train.md"])
    assert nav == [
        {"Start": [{"In five minutes": "index.md"}]},
        {"Use": [{"Train": "train.md"}, {"Deploy": "deploy.md"}]},
        {"More": ["new.md"]},
    ]


def test_links_that_leave_the_pages_become_text_and_links_to_missing_pages_stay_errors():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="speed.md"))
    files = SimpleNamespace(src_uris={"train.md", "ten-minutes.md", "benchmarks/RESULTS.md"})
    for given, wanted in (
        ("[a](train.md#b)", "[a](train.md#b)"),
        ("[a](https://example.org/x)", "[a](https://example.org/x)"),
        ("[a](#b)", "[a](#b)"),
        ("[a](../recipes/x.yaml)", "a"),
        ("[a](../benchmarks/RESULTS.md)", "[a](benchmarks/RESULTS.md)"),
        ("[a](ten-minutes.ipynb)", "[a](ten-minutes.md)"),
        ("[a](missing.md)", "[a](missing.md)"),
    ):
        assert hooks.on_page_markdown(given, page, None, files) == wanted


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ('<script src="https://unpkg.com/x"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', True),
        ('<img src="https://example.org/x.png">', True),
        ('<a href="https://example.org">x</a><script src="assets/x.js"></script>', False),
        ('<link rel="canonical" href="https://example.org/">', False),
    ],
)
def test_a_page_that_loads_from_another_server_is_refused(text, foreign):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    if not foreign:
        assert hooks.on_post_page(text, page, None) == text
        return
    with pytest.raises(hooks.PluginError, match=r"x\.md loads from another server"):
        hooks.on_post_page(text, page, None)


def test_a_notebook_becomes_a_page():
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": ["1\n"]}]},
    ]
    assert hooks.as_markdown({"cells": cells}) == "# A\nb\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n"
    page = hooks.as_markdown(json.loads((ROOT / "docs" / "ten-minutes.ipynb").read_text(encoding="utf-8")))
    assert page.startswith("# ResNet, DenseNet") and "```python" in page

"""What the page chooses from, what its handlers give, and the server's own limits, without a browser."""

import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.demo import charts, sources
from dense_shortcuts.experiments.explain.networks import read_network

app = pytest.importorskip("dense_shortcuts.experiments.demo.app")


def test_networks_are_the_shipped_one_those_of_runs_and_the_registered_ones(runs, tmp_path):
    found = sources.networks(runs)
    assert [choice.label for choice in found[:5]] == [
        "shipped DSNet-20",
        "shipped, its shortcuts taken out",
        "small: identity",
        "small: stage-auto",
        "resnet18 (not trained)",
    ]
    assert set(ds.list_models()) < {choice.name for choice in found}
    assert sources.first_pair(runs) == (str(runs / "small" / "identity"), str(runs / "small" / "stage-auto"))
    assert sources.first_pair(tmp_path) == (sources.HOST_FORM, "shipped")
    assert (sources.curves(runs), sources.benchmarks(runs)) == (["small"], ["bench"])
    assert sources.curves(tmp_path / "nowhere") == sources.benchmarks(tmp_path / "nowhere") == []


def test_the_host_form_is_the_shipped_network_without_its_shortcuts():
    host, dense = app.network_of(sources.HOST_FORM), read_network("shipped")
    assert not ds.dense_stages(host.model) and ds.dense_stages(dense.model)
    assert host.classes == dense.classes and len(host.classes) == 100
    assert torch.equal(host.model.conv1.weight, dense.model.conv1.weight)


def test_samples_come_with_scikit_learn():
    found = sources.samples()
    assert list(found)[:3] == ["china", "flower", "digit 0"] and len(found) == 12
    assert found["flower"].size == (640, 427) and found["digit 9"].size == (8, 8)


@pytest.fixture
def image(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_comparison_gives_a_map_and_the_likeliest_classes_of_each_network(runs, image):
    names = [str(runs / "small" / name) for name in ("identity", "stage-auto")]
    message, *found = app.compare(str(image), *names, "gradcam++")
    assert message == "" and len(found) == 6
    for name, (about, pixels, likeliest) in zip(names, (found[:3], found[3:]), strict=True):
        network = read_network(name)
        assert Path(name).name in about and "Not trained" not in about
        assert pixels.shape == (336, 336, 3) and pixels.dtype == np.uint8 and pixels.std() > 1
        assert len(likeliest) == 5 and set(likeliest) <= set(network.classes)
        assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"GIF89a", "not a whole image"),
        (b"<svg onload=alert(1)></svg>", "not a whole image"),
        (b"", "not a whole image"),
        (None, "Drop an image"),
    ],
)
def test_what_is_no_image_gets_a_message_and_no_result(tmp_path, content, told):
    path = None
    if content is not None:
        path = str(tmp_path / "a.png")
        Path(path).write_bytes(content)
    message, *found = app.compare(path, "dsnet20", "dsnet20", "gradcam")
    assert 'role="alert"' in message and told in message and found == [None] * 6


def test_images_that_are_too_large_are_not_decoded(tmp_path, image, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIXELS", 599)
    with pytest.raises(DenseShortcutError, match="has 600 pixels, and up to 599"):
        sources.read_upload(str(image))
    monkeypatch.setattr(sources, "MAX_MEGABYTES", 0)
    with pytest.raises(DenseShortcutError, match="larger than 0 MB"):
        sources.read_upload(str(image))


def test_messages_and_names_are_escaped():
    assert charts.error("<b>no</b>") == '<div class="ds-error" role="alert">&lt;b&gt;no&lt;/b&gt;</div>'
    assert "<i>" not in charts.html_table(["<i>"], [["<i>"]])
    assert "<i>" not in charts.lines({"<i>": [(1, 2.0)]}, "<i>")


@pytest.mark.parametrize(("value", "top"), [(97.9, 100), (0.0, 1), (1.0, 1), (1.01, 2), (0.35, 0.4), (13, 20)])
def test_an_axis_ends_on_a_round_number(value, top):
    assert charts.round_top(value) == pytest.approx(top)


# The server -----------------------------------------------------------------------------------------------------------


def test_the_page_comes_from_this_machine_alone(address):
    with urllib.request.urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert address.startswith("http://127.0.0.1:")


def test_a_taken_port_is_told_in_a_sentence(address, runs, capsys):
    port = address.rstrip("/").rpartition(":")[2]
    assert main(["demo", "--runs", str(runs), "--port", port]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    assert "pip install 'dense-shortcuts[demo]'" in capsys.readouterr().err

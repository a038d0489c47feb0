"""The table, the pictures and the verdict: figures against closed forms and known values."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from torch import nn

import dense_shortcuts as ds
from dense_shortcuts.experiments.train import comparison, measure, report
from dense_shortcuts.experiments.train.config import TrainConfig


def test_multiply_adds_of_a_small_network_are_the_closed_form():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    assert measure.multiply_adds(net, 6) == 36 * (3 * 8 * 9 + 8 * 8) + 8 * 36 * 5


@pytest.mark.parametrize("backend", ["plain", "channels_last"])
def test_dense_shortcuts_cost_one_multiply_add_for_each_number_of_each_pair(backend):
    dense = timm.create_model("dsnet20", num_classes=10).train()
    host = ds.unplug(timm.create_model("dsnet20", num_classes=10))
    if backend == "channels_last":
        dense, host = (m.to(memory_format=torch.channels_last) for m in (dense, host))
    pairs = 3 * 4 // 2  # three blocks a stage
    expected = pairs * (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8)
    assert measure.multiply_adds(dense, 32) - measure.multiply_adds(host, 32) == expected
    assert dense.training and not dense.layer1.shortcut._forward_hooks


def test_inner_shortcuts_cost_one_multiply_add_for_each_number_of_their_map():
    outer = ds.plug_in(timm.create_model("resnet26", num_classes=10))
    inner = ds.plug_in(timm.create_model("resnet26", num_classes=10), inner=True)
    # Two bottlenecks a stage; the 3x3 of the first one keeps its shape in the first stage only.
    expected = 2 * 64 * 16 * 16 + 128 * 8 * 8 + 256 * 4 * 4 + 512 * 2 * 2
    assert measure.multiply_adds(inner, 64) - measure.multiply_adds(outer, 64) == expected


def test_resnet50_has_its_known_parameters_and_multiply_adds():
    net = timm.create_model("resnet50")
    assert measure.parameters(net) == 25_557_032
    assert measure.multiply_adds(net, 224) == pytest.approx(4.09e9, rel=0.005)


def test_memory_of_a_training_step_holds_at_least_what_must_be_there_and_grows_with_the_batch():
    small, large = (measure.training_step_memory(TrainConfig(batch_size=b, img_size=16), 10) for b in (8, 64))
    parameters = 4 * measure.parameters(timm.create_model("dsnet20", num_classes=10))
    assert small > 3 * parameters  # weights, gradients, momentum
    # The stem's and the three stages' maps before and after each norm are kept for the backward pass.
    kept = 4 * (16 * 16 * 16 + 6 * 16 * 16 * 16 + 6 * 32 * 8 * 8 + 6 * 64 * 4 * 4)
    assert large - small > 56 * kept
    assert large - small < 56 * kept * 6


def test_gradient_checkpointing_lowers_the_memory_of_a_training_step():
    plain, checkpointed = (
        measure.training_step_memory(TrainConfig(batch_size=64, img_size=16, grad_checkpointing=c), 10)
        for c in (False, True)
    )
    assert checkpointed < 0.8 * plain


def test_inference_speed_ranks_a_deep_network_below_a_shallow_one():
    config = TrainConfig(img_size=16, batch_size=16)
    nets = [timm.create_model(name, num_classes=10) for name in ("dsnet20", "dsnet110")]
    fast, slow = measure.inference_speed(nets, config, rounds=1)
    assert fast > 2 * slow > 0


def test_two_networks_are_paired_by_image_and_over_seeds():
    labels = torch.zeros(6, dtype=torch.long)
    first = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]])
    second = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0]])
    pair = comparison.paired(first, second, labels)
    assert pair["by_seed"] == pytest.approx([100 / 6, 50.0]) and pair["difference"] == pytest.approx(100 / 3)
    gaps = [0.0, 1.0, 1.0, 0.0, 0.5, -0.5]  # by image, the mean of the seeds
    mean = sum(gaps) / 6
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / 5) ** 0.5
    assert pair["p_value"] == pytest.approx(2 * stats.t.sf(mean / (deviation / 6**0.5), 5))
    assert comparison.paired(first, first, labels)["p_value"] == 1.0


ROWS = {
    name: {"train_images_per_second": train, "infer_images_per_second": infer, "peak_bytes": memory}
    for name, train, infer, memory in (("host", 400.0, 900.0, 100), ("dsnet", 200.0, 600.0, 110))
}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ({"difference": 2.0, "by_seed": [1.5, 2.5], "p_value": 2e-9}, "2.00 points above the host (p = 2e-09 on each"),
        ({"difference": -2.0, "by_seed": [-2.0], "p_value": 0.01}, "2.00 points below the host (p = 0.01)"),
        (
            {"difference": 0.5, "by_seed": [0.5], "p_value": 0.31},
            "0.50 points above the host (within chance, p = 0.31)",
        ),
        ({"difference": 1.0, "by_seed": [3.0, -1.0], "p_value": 0.01}, "within chance, the seeds disagree, p = 0.01"),
    ],
)
def test_the_verdict_names_the_gap_and_whether_chance_gives_as_much(pair, said):
    accuracy, _, _ = comparison.verdict(ROWS, {("host", "dsnet"): pair})
    assert accuracy.startswith("Accuracy: the DSNet is ") and said in accuracy


def test_the_verdict_names_the_price_in_time_and_memory():
    pair = {"difference": 2.0, "by_seed": [2.0], "p_value": 0.01}
    _, time, memory = comparison.verdict(ROWS, {("host", "dsnet"): pair})
    assert time.endswith("a training step takes 2.00x in the DSNet, inference 1.50x in the DSNet.")
    assert memory == "Memory of a training step, against the host: 1.10x in the DSNet."


def history(scale: float) -> list[dict]:
    keys = ("train_loss", "test_loss", "train_top1", "test_top1")
    speeds = {"train_images_per_second": 100.0}
    return [{"epoch": e, **{k: scale * e for k in keys}, **speeds, "test_top5": 50.0} for e in (1, 2, 3)]


def test_a_row_takes_the_last_epoch_and_leaves_the_first_out_of_the_speed():
    entries = history(2.0)
    entries[0]["train_images_per_second"], entries[2]["train_images_per_second"] = 10.0, 300.0
    row = report.row("host", "identity", [entries], 100, {"parameters": 1})
    assert (row["test_top1"], row["epochs"], row["train_images_per_second"]) == (6.0, 3, 200.0)
    assert report.row("host", "identity", [entries[:1]], 100, {})["train_images_per_second"] == 10.0


def test_a_row_of_several_seeds_has_their_mean_and_its_interval():
    row = report.row("host", "identity", [history(10.0), history(20.0)], 400, {})
    assert (row["test_top1"], row["test_top1_by_seed"]) == (45.0, [30.0, 60.0])
    assert row["interval"] == pytest.approx(100 * 1.96 * (0.45 * 0.55 / 400) ** 0.5)


def test_the_markdown_table_has_every_figure():
    costs = {
        "parameters": 1234567,
        "multiply_adds": 41_000_000,
        "infer_images_per_second": 2000.4,
        "peak_bytes": 3 << 30,
    }
    text = report.markdown([report.row("host", "identity", [history(1.0)], 100, costs)], "A note.", ["A verdict."])
    assert "| host | 3.00 ± 3.34 | 1,234,567 | 41.0 M | 100 | 2,000 | 3.00 GiB |" in text
    assert text.splitlines()[0].count("|") == text.splitlines()[2].count("|") == 8
    assert "A note." in text and text.rstrip().endswith("- A verdict.")


def test_the_picture_of_a_comparison_has_a_colour_for_each_network(tmp_path):
    rows = {
        name: {"test_top1": 3.0, "interval": 1.0, "train_images_per_second": 100.0, "peak_bytes": 1 << 20}
        for name in ROWS
    }
    histories = {
        name: [[{"train_seconds": 1.0} | e for e in history(scale)]] for name, scale in (("host", 1.0), ("dsnet", 2.0))
    }
    comparison.picture(tmp_path / "c.png", rows, histories)
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (pixels == colour).all(1).sum() > 400


def test_the_curves_are_a_picture_with_a_colour_for_each_network(tmp_path):
    report.curves(tmp_path / "c.png", {"identity": history(1.0), "stage-auto": history(2.0)})
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib's tab10
        assert (pixels == colour).all(1).sum() > 200
    assert (pixels == (255, 255, 255)).all(1).mean() > 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_a_row_is_json():
    row = report.row("host", "identity", [history(1.0)], 100, {"parameters": 1})
    assert json.loads(json.dumps(row)) == row


def test_the_note_says_how_long_training_waited_for_data_and_what_was_broken():
    def history(*shares, broken=0):
        return [{"train_data_wait_share": share, "broken_images": broken} for share in shares]

    assert report.data_note([history(0.5, 0.01, 0.012)]) == (
        "Training waited for data during 1.2% of the time (median of the epochs)."
    )
    note = report.data_note([history(0.01), history(0.034, broken=2)])
    assert note == (
        "Training waited for data during 3.4% of the time (median of the epochs, the network that waited most). "
        "2 broken images were left out."
    )
    assert report.data_note([history(0.01, broken=1)]).endswith("1 broken image was left out.")

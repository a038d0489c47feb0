"""The estimate for many GPUs: its arithmetic by hand, and the table of the command."""

import pytest
import timm
from torch import nn

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.scaling import (
    BUCKET_BYTES,
    Cluster,
    Messages,
    estimates,
    exchange_seconds,
    messages,
)

CLUSTER = Cluster(gpus_per_machine=8, inside=400.0, between=10.0, latency=1e-5, price_per_hour=2.5)


def test_messages_are_the_gradients_of_what_is_trained_and_two_for_each_synchronised_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False))
    model[0].bias.requires_grad_(False)
    assert messages(model, sync_bn=False) == Messages(4 * (3 * 8 * 9 + 16), 1, 0)
    assert messages(model, sync_bn=True).small == 4
    batch = messages(timm.create_model("dsnet20", norm="batch"), sync_bn=True)
    assert (
        batch.small == 2 * 21 + 5 * 9
    )  # norms of the host, with two projections, and a map before each of nine blocks
    dense = messages(timm.create_model("dsnet50"), sync_bn=False)
    host = messages(timm.create_model("resnet50"), sync_bn=False)
    assert host.gradients == 4 * 25_557_032 and host.buckets == -(-host.gradients // BUCKET_BYTES)
    assert 0 < dense.gradients - host.gradients < 0.01 * host.gradients


def test_a_ring_takes_the_slowest_link_and_a_latency_for_every_step():
    found = Messages(100_000_000, 4, 6)
    assert exchange_seconds(found, 1, CLUSTER) == 0
    assert exchange_seconds(found, 8, CLUSTER) == pytest.approx(2 * 7 / 8 * 0.1 / 400 + 2 * 7 * 1e-5 * 10)
    assert exchange_seconds(found, 16, CLUSTER) == pytest.approx(2 * 15 / 16 * 0.1 / 10 + 2 * 15 * 1e-5 * 10)


def test_hours_and_cost_follow_from_steps_and_seconds():
    found = Messages(100_000_000, 4, 0)
    one, many = estimates(found, (1, 16), CLUSTER, images_per_second=1000, batch_per_gpu=100, images=3_600_000)
    assert (one.hidden, one.exposed, one.cost, one.efficiency) == pytest.approx((1.0, 1.0, 2.5, 1.0))
    exchange = exchange_seconds(found, 16, CLUSTER)
    assert many.batch == 1600
    assert many.hidden == pytest.approx(1 / 16)
    assert many.exposed == pytest.approx((0.1 + exchange) / 0.1 / 16)
    assert many.cost == pytest.approx(many.exposed * 16 * 2.5)
    [slow] = estimates(found, (16,), CLUSTER, images_per_second=1e6, batch_per_gpu=100, images=3_600_000)
    assert slow.hidden == pytest.approx(3_600_000 / 1600 * exchange / 3600)  # there is no room to hide it in


@pytest.mark.parametrize("change", [{"images_per_second": 0}, {"batch_per_gpu": 0}, {"counts": (0,)}])
def test_numbers_that_cannot_be_are_refused(change):
    given = {"counts": (1,), "images_per_second": 10.0, "batch_per_gpu": 1, "images": 1} | change
    with pytest.raises(DenseShortcutError, match="is 0: it must be above 0"):
        estimates(Messages(1, 1, 0), given.pop("counts"), CLUSTER, **given)


def test_the_command_prints_a_row_for_each_number_of_gpus(capsys):
    arguments = ["--model", "dsnet20", "--images-per-second", "500", "--price-per-hour", "3", "--gpus", "1", "16"]
    assert main(["scaling", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("dsnet20: 1.1 MB of gradients a step in 1 messages, and 0 small ones")
    assert [line.split("|")[1].strip() for line in out[4:]] == ["1", "16"]
    assert main(["scaling", "--model", "dsnet21", "--images-per-second", "500"]) == 2
    assert "unknown model 'dsnet21'" in capsys.readouterr().err

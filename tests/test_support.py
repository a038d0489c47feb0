"""`dsnet support` on a network that can be plugged into and one that cannot."""

import json

import pytest
import torch
import torchvision
from torch import nn

from dense_shortcuts import support
from dense_shortcuts.cli import main

PLACES = [("timm", "resnet", "test_resnet"), ("torchvision", "squeezenet", "squeezenet1_1")]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(support, "architectures", lambda pattern: PLACES)


def test_every_check_passes_on_a_residual_network_and_another_is_refused_with_the_reason():
    plugged, refused = (support.examine(*place) for place in PLACES)
    assert plugged.verdict == "plugged" and set(plugged.checks.values()) == {"yes"}, plugged.checks
    assert set(plugged.checks) == set(support.CHECKS) and plugged.stages == 4
    assert 0 < plugged.parameters < 0.05 and 0 < plugged.multiply_adds < 0.05
    assert refused.verdict == "refused" and "nothing to plug into" in refused.refusal and not refused.checks


def test_a_check_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(support, "unplug", lambda model: model)
    row = support.examine(*PLACES[0])
    assert row.verdict == "failed" and row.checks["unplug"].startswith("no: the host did not come back")


def test_features_that_the_host_itself_cannot_give_are_the_hosts():
    class AsksForItsData(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    blocks, x = torchvision.models.resnet18().layer1.eval(), torch.randn(1, 64, 8, 8)
    assert support._features("torchvision", "", AsksForItsData(blocks, nn.ReLU()), x) == "host: TraceError"
    assert support._features("torchvision", "", nn.Sequential(blocks, nn.ReLU()), x) == "yes"


def test_the_command_writes_a_table_and_goes_on_from_what_is_done(few, tmp_path, capsys, monkeypatch):
    done = support.Row(*PLACES[1], refusal="seen before")
    (tmp_path / "rows.jsonl").write_text(json.dumps(vars(done)) + "\n")
    assert main(["support", "--output", str(tmp_path)]) == 0
    assert "1 of them done" in capsys.readouterr().out
    table = (tmp_path / "support.md").read_text()
    assert "1 plugged with every check passed, 1 refused" in table and "| test_resnet | timm resnet | 4 |" in table
    assert len(support.read_rows(tmp_path / "rows.jsonl")) == 2


def test_architectures_are_the_smallest_of_a_family_with_the_same_blocks():
    found = support.architectures("resnet1*")
    names = [name for library, family, name in found if (library, family) == ("timm", "resnet")]
    assert names == ["resnet10t", "resnet14t"]  # one of basic blocks, one of bottlenecks
    assert ("torchvision", "resnet", "resnet18") in found

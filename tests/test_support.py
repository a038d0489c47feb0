"""`dsnet support` on networks that can be plugged into and others that cannot."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import dense_shortcuts as ds
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.support import checks, examining, names, planning, report, subject, sweep
from dense_shortcuts.experiments.support.names import Place
from dense_shortcuts.experiments.support.planning import Planned

RESNET = Place("timm", "resnet", "test_resnet")
SQUEEZENET = Place("torchvision", "squeezenet", "squeezenet1_1")
PAGE = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")


def test_every_check_passes_on_a_residual_network():
    planned = planning.plan_one(RESNET)
    assert planned.verdict == "planned" and planned.stages == 4 and 0 < planned.parameters < 0.05
    row = examining.examine(planned)
    assert row.verdict == "plugged" and set(row.checks.values()) == {"yes"}, row.checks
    assert set(row.checks) == set(checks.CHECKS) and not row.shapes_alone
    assert 0 < row.multiply_adds < 0.05


def test_a_network_that_is_too_large_to_run_is_checked_in_its_shapes(monkeypatch):
    monkeypatch.setattr(examining, "LARGEST", 0)
    row = examining.examine(planning.plan_one(RESNET))
    assert row.verdict == "shapes alone" and row.shapes_alone and set(row.checks.values()) == {"yes"}, row.checks
    assert 0 < row.multiply_adds < 0.05


@pytest.mark.parametrize(("name", "family", "most"), [("vit_tiny_patch16_dinov3_qkvb", "eva", 0.005)])
def test_the_trace_of_a_first_forward_pass_is_not_counted(name, family, most):
    made = subject.make(Place("timm", family, name), torch.device("cpu"))
    host, plugged = (examining.multiply_adds(model, made.x) for model in (made.host, made.plugged))
    assert 0 < plugged / host - 1 < most


def test_a_check_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(checks, "unplug", lambda model: model)
    row = examining.examine(planning.plan_one(RESNET))
    assert row.verdict == "failed" and row.checks["unplug"].startswith("no: the host did not come back")


def test_a_plug_that_loses_a_branch_which_starts_at_zero_is_seen(monkeypatch):
    """timm's ResNets start the last norm of every branch at zero: with fresh weights no branch is seen at all."""

    def without_branches(host, **options):
        for module in host.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).bias)
        return host

    made = subject.make(RESNET, torch.device("cpu"))
    assert checks._keeps_host(made) == "yes"
    monkeypatch.setattr(checks, "plug_in", without_branches)
    assert checks._keeps_host(made) == "no: the output moved"


def test_random_numbers_reach_every_constant_and_the_statistics():
    host = timm.create_model("resnet18", num_classes=4, zero_init_last=True)
    subject.randomise(host, torch.randn(2, 3, 64, 64))
    assert not host.training
    for name, value in (*host.named_parameters(), *host.named_buffers()):
        assert value.numel() == 1 or not (value == value.flatten()[0]).all(), name
    assert {m.momentum for m in host.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize(
    ("results", "shapes_alone", "verdict"),
    [
        ({"forward": "yes", "step": "no: 1 weight stays"}, False, "failed"),
        ({}, False, "unchecked"),
        ({"forward": "host: takes none"}, False, "unchecked"),
        ({"forward": "yes", "compile": "host: Unsupported"}, False, "but for the host"),
        ({"forward": "yes"}, True, "shapes alone"),
        ({"forward": "yes"}, False, "plugged"),
    ],
)
def test_a_verdict_says_no_more_than_the_checks(results, shapes_alone, verdict):
    assert examining.Row(*RESNET, checks=results, shapes_alone=shapes_alone).verdict == verdict


def test_all_that_a_network_gives_is_looked_at():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1, self.layer2 = copy.deepcopy(blocks), copy.deepcopy(blocks)

        def forward(self, x):
            first = self.layer1(x)
            return {"0": first, "1": [self.layer2(first)]}

    blocks = torchvision.models.resnet18().layer1
    host = Backbone().eval()
    made = subject.Subject(
        Place("torchvision", "", ""), host, ds.plug_in(copy.deepcopy(host)), torch.randn(2, 64, 8, 8)
    )
    assert checks._step(made) == "yes"
    output = host(made.x)
    other = {"0": output["0"], "1": [output["1"][0] + 1]}
    assert checks._equal(output, output) and checks._close(output, output)
    assert not checks._equal(other, output) and not checks._close(other, output)


def test_features_that_the_host_itself_cannot_give_are_the_hosts():
    class AsksForItsData(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    def features(host):
        return checks._features(subject.Subject(Place("torchvision", "", ""), host, host, torch.randn(1, 64, 8, 8)))

    blocks = torchvision.models.resnet18().layer1.eval()
    assert features(AsksForItsData(copy.deepcopy(blocks), nn.ReLU())) == "host: TraceError"
    assert features(nn.Sequential(blocks, nn.ReLU())) == "yes"


# Names and plans ------------------------------------------------------------------------------------------------------


def test_every_network_of_torchvision_is_listed_but_none_of_this_package():
    found = names.places()
    assert {place.name for place in found if place.library == "torchvision"} == set(torchvision.models.list_models())
    tasks = {place.family for place in found if place.library == "torchvision"}
    assert {"video.resnet", "quantization.resnet", "segmentation", "detection", "optical_flow.raft"} <= tasks
    timms = {place.name for place in found if place.library == "timm"}
    assert len(timms) > 1000 and timms < set(timm.list_models())
    assert not timms & {*ds.list_models(), "densenet121_cifar", "rdnet_tiny_cifar"}


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(names.NOT_RESIDUAL))
def test_no_network_can_be_plugged_of_a_family_that_is_called_not_residual(family):
    members = [place for place in names.places() if place.family.rpartition(".")[2] == family]
    assert members
    assert {planning.plan_one(place).verdict for place in (members[0], members[-1])} == {"refused"}


def test_no_family_that_the_page_has_plugged_is_called_not_residual():
    plugged = re.findall(
        r"^\| \S+ \| (?:timm|torchvision) (\S+) \| \d+ \|", PAGE.partition("## Refused")[0], re.MULTILINE
    )
    assert len(plugged) > 100 and all(map(names.is_residual, plugged))


def test_an_architecture_has_the_blocks_of_its_smallest_network_and_refused_ones_stand_apart():
    plans = [planning.plan_one(place) for place in names.places("repvit_m1*")[:2]]
    groups = {members[0].name: [row.name for row in members] for members in planning.architectures(plans)}
    assert {row.name for row in plans} == {"repvit_m1", "repvit_m1_0"}
    for name, members in groups.items():
        verdicts = {row.verdict for row in plans if row.name in members}
        assert len(verdicts) == 1, (name, members)
        assert name == min((row.size, row.name) for row in plans if row.name in members)[1]


def test_of_a_refusal_the_reason_is_left():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return 2 * self.conv(x)

    with pytest.raises(ds.DenseShortcutError) as refused:
        ds.plan(nn.Sequential(Halves(), Halves()))
    assert "teach it" in str(refused.value)
    assert planning.reason(str(refused.value)).endswith("its output is not a sum with an activation behind it")
    assert re.match(r"\S*Halves at \S+: ", planning.reason(str(refused.value)))
    assert planning.reason("A has nothing to plug into. B at c.0: it is set so.") == "B at c.0: it is set so"


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_counts_names_architectures_and_families_for_what_they_are():
    plugged = Planned(*RESNET, size=1, blocks="Basic", stages=4)
    larger = dataclasses.replace(plugged, name="larger", size=2)
    refused = dataclasses.replace(plugged, name="other", blocks="", stages=0, refusal="Other at a.0: it is | set so")
    plans = [plugged, larger, refused, Planned(*SQUEEZENET, refusal="Fire at b: none")]
    plans += [Planned("timm", "rexnet", "rexnet_100", refusal="LinearBottleneck at c: none")]
    plans += [Planned("torchvision", "detection", "some_fpn", blocks="Basic", stages=1)]
    rows = [examining.Row(*RESNET, checks={"forward": "yes"}, multiply_adds=0.01)]
    rows += [examining.Row("torchvision", "detection", "some_fpn", checks={"forward": "yes"}, shapes_alone=True)]
    page = report.markdown(plans, rows, "dsnet support")
    assert "of 6 networks 3 can be plugged by their plan, 3 are refused with a reason and 0 fail" in page
    assert "of 2 that are plugged 1 pass every check; 0 pass all that the host" in page and "1 are too large" in page
    assert "of 2 with residual blocks 1 are served (50 %)" in page and "in 0 of them no name is refused" in page
    assert "| test_resnet | timm resnet | 4 | +0.00 % | +1.00 % |  |" in page
    assert "| other | timm resnet | 1 | Other at a.0: it is / set so |" in page
    assert "| squeezenet1_1 | torchvision squeezenet | 1 | concatenations of branches |" in page
    assert "| timm resnet | 3 | 2 | 1 |" in page


def test_the_command_writes_a_page_and_goes_on_from_what_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "places", lambda pattern: [RESNET, SQUEEZENET])
    (tmp_path / "plans.jsonl").write_text(json.dumps(vars(Planned(*SQUEEZENET, refusal="seen before"))) + "\n")
    assert main(["support", "--output", str(tmp_path)]) == 0
    assert "2 networks, 1 of them planned" in capsys.readouterr().out
    page = (tmp_path / "support.md").read_text()
    assert "of 1 that are plugged 1 pass every check" in page and "| test_resnet | timm resnet | 4 |" in page
    assert [row.name for row in sweep.read(tmp_path / "plans.jsonl", Planned)] == ["squeezenet1_1", "test_resnet"]
    assert main(["support", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 networks, 2 of them planned" in out and "1 architectures, 1 of them examined" in out

"""The backbone: its maps, the weights it starts from, and what freezing and norm_eval touch."""

import copy

import detect_helpers
import pytest
import timm
import torch
import torchvision
from detect_helpers import tiny_backbone  # noqa: F401 (registers it)
from safetensors.torch import load_file, save_file
from torch import nn

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError
from dense_shortcuts.backbone import Backbone, usual_levels

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
NORMS = nn.modules.batchnorm._BatchNorm


@pytest.fixture
def weights(tmp_path):
    """Random weights of the host, in every norm and statistic too."""
    torch.manual_seed(3)
    host = timm.create_model("tiny_backbone")
    for module in host.modules():
        if isinstance(module, NORMS):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path / "host.safetensors"
    save_file(host.state_dict(), path)
    return path


def host_maps(weights, dtype=torch.float32):
    host = timm.create_model("tiny_backbone", features_only=True, out_indices=(1, 2, 3, 4))
    state = load_file(weights)
    host.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    return host.eval().to(dtype)(IMAGES.to(dtype))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny_backbone", {}),
        ("tiny_backbone", {"aggregate": "stage"}),
        ("dsnet18", {}),
        ("dsnet18", {"aggregate": "identity"}),
        ("dsnet20", {}),
        ("convnext_atto", {}),
        ("regnetx_002", {}),
        ("mobilenetv3_small_050", {}),
    ],
)
def test_maps_have_the_width_and_stride_that_is_told(name, options):
    backbone = Backbone(name, **options).eval()
    maps = backbone(IMAGES)
    assert isinstance(maps, tuple) and len(maps) == len(backbone.channels)
    for each, channels, reduction in zip(maps, backbone.channels, backbone.reductions, strict=True):
        assert each.shape == (2, channels, 64 // reduction, 64 // reduction)
    dsnet = options.get("aggregate", "stage" if name.startswith("dsnet") else "identity") == "stage"
    assert bool(ds.dense_stages(backbone.features)) == dsnet


def test_maps_with_the_channel_as_last_axis_are_turned():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        img_size=64,
        window_size=2,
        depths=(1, 1, 1, 1),
        embed_dim=12,
        num_heads=(1, 1, 1, 1),
    )
    backbone = Backbone(swin).eval()
    assert [tuple(m.shape[1:]) for m in backbone(IMAGES)] == [(12, 16, 16), (24, 8, 8), (48, 4, 4), (96, 2, 2)]


def test_usual_levels_are_the_last_of_each_stride():
    assert usual_levels([2, 4, 8, 16, 32], 4) == (1, 2, 3, 4)
    assert usual_levels([2, 4, 8, 16, 32], 8) == (2, 3, 4)
    assert usual_levels([1, 1, 2, 4], 4) == (1, 2, 3)  # small-image networks have one level that coarse
    assert usual_levels([4, 8, 16, 16], 4) == (0, 1, 3)


def test_levels_can_be_chosen_and_counted_from_the_end():
    assert Backbone("tiny_backbone", out_indices=(4, 2)).reductions == (8, 32)
    assert Backbone("tiny_backbone", out_indices=(-1,)).channels == (32,)
    assert not hasattr(Backbone("tiny_backbone", out_indices=(2,)).features, "layer3")
    for wrong in ((5,), (1, -6), ()):
        with pytest.raises(DenseShortcutError, match="has the levels 0 to 4"):
            Backbone("tiny_backbone", out_indices=wrong)
    with pytest.raises(DenseShortcutError, match=r"strides \(1, 1\), which must grow"):
        Backbone("dsnet20", out_indices=(0, 1))


def test_an_unknown_name_is_refused():
    with pytest.raises(DenseShortcutError, match="unknown model 'tiny_resnot'"):
        Backbone("tiny_resnot")


def test_a_ready_network_is_plugged_in_by_the_options_or_refused():
    def ready() -> nn.Module:
        return timm.create_model("tiny_backbone", features_only=True, out_indices=(1, 2, 3, 4))

    assert not ds.dense_stages(Backbone(ready()).features)
    plugged = Backbone(ready(), norm="batch", keep_identity=True)
    stages = ds.dense_stages(plugged.features).values()
    assert len(stages) == 4 and all(type(stage.shortcut.norms[0]) is nn.BatchNorm2d for stage in stages)
    assert plugged.loaded and not any(".shortcut." in name for name in plugged.loaded)
    assert not ds.dense_stages(Backbone(ds.plug_in(ready()), aggregate="identity").features)
    with pytest.raises(DenseShortcutError, match="plugged in already"):
        Backbone(ds.plug_in(ready()), norm="batch")
    for options in ({"nrom": "batch"}, {"aggregate": "identity", "nrom": "batch"}):
        with pytest.raises(TypeError, match="nrom"):
            Backbone(ready(), **options)
        with pytest.raises(TypeError, match="nrom"):
            Backbone("tiny_backbone", **options)
    for options in ({"out_indices": (1,)}, {"finest": 8}, {"pretrained": True}):
        with pytest.raises(DenseShortcutError, match="a ready network was given"):
            Backbone(ready(), **options)


@pytest.mark.parametrize("make", [torchvision.models.resnet18, lambda: timm.create_model("resnet18"), nn.Identity])
def test_a_network_that_gives_no_maps_is_refused_in_one_sentence(make):
    with pytest.raises(DenseShortcutError, match=r"does not say which feature maps .* features_only=True") as error:
        Backbone(make())
    assert "\n" not in str(error.value)


# Weights --------------------------------------------------------------------------------------------------------------


def test_a_host_plugged_in_with_keep_identity_starts_as_the_host_of_the_file(weights):
    backbone = Backbone("tiny_backbone", weights=weights, norm="group", keep_identity=True).double().eval()
    assert ds.dense_stages(backbone.features)
    for ours, theirs in zip(backbone(IMAGES.double()), host_maps(weights, torch.float64), strict=True):
        assert torch.equal(ours, theirs)
    assert "backbone: 8 tensors of dense shortcuts start fresh" in backbone.notes  # two blocks in each of four stages
    assert any("2 tensors of the file have no place in the backbone: fc.bias, fc.weight" in n for n in backbone.notes)


def test_timms_pretrained_weights_come_by_timms_own_way(weights, monkeypatch):
    monkeypatch.setitem(detect_helpers.OVERLAY, "file", str(weights))
    backbone = Backbone("tiny_backbone", pretrained=True, keep_identity=True).double().eval()
    for ours, theirs in zip(backbone(IMAGES.double()), host_maps(weights, torch.float64), strict=True):
        assert torch.equal(ours, theirs)
    assert "layer1.0.conv1.weight" in backbone.loaded and "layer1.shortcut.weights.0" not in backbone.loaded


def test_pretrained_weights_that_are_nowhere_are_one_sentence():
    with pytest.raises(DenseShortcutError, match="no pretrained weights of tiny_backbone"):
        Backbone("tiny_backbone", pretrained=True)


def test_a_trained_dsnets_weights_are_loaded_with_their_shortcuts(tmp_path):
    torch.manual_seed(5)
    trained = ds.plug_in(timm.create_model("tiny_backbone"))
    for _, parameter in ds.shortcut_parameters(trained):
        nn.init.normal_(parameter)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    backbone = Backbone("tiny_backbone", aggregate="stage", weights=tmp_path / "w.safetensors", frozen_stages=1)
    weight = backbone.features.layer1.shortcut.weights[1]
    assert torch.equal(weight, trained.layer1.shortcut.weights[1]) and not weight.requires_grad
    with pytest.raises(DenseShortcutError, match=r"unexpected: layer1\.shortcut"):
        Backbone("tiny_backbone", weights=tmp_path / "w.safetensors")
    with pytest.raises(DenseShortcutError, match="weights are of another network"):
        Backbone("dsnet18", weights=tmp_path / "w.safetensors")


def test_late_stages_that_a_backbone_leaves_out_are_told_not_refused(weights):
    backbone = Backbone("tiny_backbone", out_indices=(1, 2), weights=weights)
    assert any("have no place in the backbone" in note and "layer3.0.bn1.bias" in note for note in backbone.notes)


def test_names_that_timms_extractor_changes_are_found(tmp_path):
    whole = timm.create_model("convnext_atto")
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    backbone = Backbone("convnext_atto", weights=tmp_path / "w.safetensors", frozen_stages=0)
    assert torch.equal(backbone.features.stages_3.blocks[0].mlp.fc1.weight, whole.stages[3].blocks[0].mlp.fc1.weight)
    held = {name for name, p in backbone.features.named_parameters() if not p.requires_grad}
    assert held == {"stem_0.weight", "stem_0.bias", "stem_1.weight", "stem_1.bias"}


# Freezing -------------------------------------------------------------------------------------------------------------


def step(backbone: Backbone) -> dict[str, bool]:
    """A step of training; whether each entry of the state dict changed."""
    before = {name: value.clone() for name, value in backbone.features.state_dict().items()}
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    backbone.train()
    sum(m.square().mean() for m in backbone(IMAGES)).backward()
    optimizer.step()
    return {name: not torch.equal(value, before[name]) for name, value in backbone.features.state_dict().items()}


def test_frozen_stages_keep_what_was_loaded_and_train_what_is_fresh(weights):
    backbone = Backbone("tiny_backbone", weights=weights, keep_identity=True, frozen_stages=2)
    changed = step(backbone)
    fresh = {name for name in changed if ".shortcut." in name}
    host = [name for name in changed if name.startswith(("conv1", "bn1", "layer1", "layer2")) and name not in fresh]
    assert host and not any(changed[name] for name in host)  # running statistics too
    assert all(changed[name] for name in changed if name.startswith(("layer3", "layer4")) and "shortcut" not in name)
    assert all(changed[name] for name in fresh if "weights" in name and name.startswith(("layer1", "layer2")))
    told = " ".join(backbone.notes)
    assert "of the frozen stages were not loaded and stay trainable: layer1.shortcut.weights.0" in told
    assert "parameters in 33 tensors are frozen" in told


def test_a_fresh_batch_norm_of_a_shortcut_goes_on_in_a_frozen_stage(weights):
    backbone = Backbone("tiny_backbone", weights=weights, aggregate="stage", norm="batch", frozen_stages=1)
    backbone.train()
    training = {n: m.training for n, m in backbone.features.named_modules() if isinstance(m, NORMS) and "layer1" in n}
    assert training == {n: ".shortcut." in n for n in training} and any(training.values())


@pytest.mark.parametrize(("stages", "last"), [(-1, None), (0, "bn1"), (1, "layer1"), (3, "layer3")])
def test_stages_are_counted_with_the_stem_as_0(stages, last, weights):
    backbone = Backbone("tiny_backbone", weights=weights, frozen_stages=stages).train()
    held = {name.split(".")[0] for name, p in backbone.features.named_parameters() if not p.requires_grad}
    order = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert held == set(order[: order.index(last) + 1] if last else [])
    assert backbone.features.bn1.training == (stages == -1)
    assert backbone.eval().training is False and not backbone.features.layer4[0].bn1.training
    assert backbone.train().features.layer4[0].bn1.training


def test_nothing_is_frozen_where_nothing_was_loaded_and_it_is_told(caplog):
    with caplog.at_level("INFO", logger="dense_shortcuts"):
        backbone = Backbone("tiny_backbone", frozen_stages=2, norm_eval=True)
    changed = step(backbone)
    assert all(changed[name] for name in changed if "running" in name)
    assert changed["conv1.weight"] and changed["layer2.1.bn2.weight"]
    assert "backbone: nothing is frozen" in caplog.text and "norm_eval holds no batch norm" in caplog.text


def test_more_stages_than_there_are_is_refused():
    with pytest.raises(DenseShortcutError, match="frozen_stages=5 is more than the 4 stages"):
        Backbone("tiny_backbone", frozen_stages=5)
    with pytest.raises(DenseShortcutError, match="does not say which modules"):
        Backbone("hrnet_w18_small", frozen_stages=1)


def test_norm_eval_keeps_loaded_statistics_while_weights_train(weights):
    backbone = Backbone("tiny_backbone", weights=weights, keep_identity=True, norm_eval=True)
    changed = step(backbone)
    statistics = {name for name in changed if "running" in name or "num_batches" in name}
    loaded = {name for name in statistics if "shortcut" not in name}
    assert loaded and not any(changed[name] for name in loaded)
    assert changed["bn1.weight"] and changed["layer4.1.bn2.bias"]
    loose = Backbone("tiny_backbone", weights=weights, keep_identity=True)
    assert step(loose)["bn1.running_mean"]


def test_a_ready_network_counts_as_loaded_but_for_its_shortcuts():
    host = timm.create_model("tiny_backbone", features_only=True, out_indices=(1, 2))
    features = ds.plug_in(host, keep_identity=True)
    backbone = Backbone(features, frozen_stages=1)
    held = {name for name, p in backbone.features.named_parameters() if not p.requires_grad}
    assert "layer1.0.conv1.weight" in held and not any("shortcut" in name for name in held)


def test_a_copy_and_one_with_synchronised_norms_hold_still(weights):
    backbone = Backbone("tiny_backbone", weights=weights, frozen_stages=1, norm_eval=True)
    for other in (copy.deepcopy(backbone), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(backbone))):
        other.train()
        norms = [m for m in other.modules() if isinstance(m, NORMS)]
        assert len(norms) == 21 and not any(m.training for m in norms)
    assert type(norms[0]) is nn.SyncBatchNorm

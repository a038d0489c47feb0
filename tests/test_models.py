"""One sweep over every registered network, and the numbers that make each the network it is called."""

import copy
import pickle

import pytest
import timm
import torch
import torch.utils.checkpoint
from hosts import assert_close, randomise
from timm.models import FeatureListNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

import dense_shortcuts as ds

HOSTS = {
    "dsnet18": "resnet18",
    "dsnet34": "resnet34",
    "dsnet26": "resnet26",
    "dsnet50": "resnet50",
    "dsnet101": "resnet101",
    "dsnet152": "resnet152",
    "dsnext50_32x4d": "resnext50_32x4d",
    "dsnext101_32x8d": "resnext101_32x8d",
    "wide_dsnet50_2": "wide_resnet50_2",
    "se_dsnet50": "seresnet50",
    "ds2net50": "resnet50",
    "ds2net101": "resnet101",
    "ds2net152": "resnet152",
    "ds2res2net50": "res2net50_26w_4s",
}
CIFAR = {"dsnet20": 3, "dsnet32": 5, "dsnet56": 9, "dsnet110": 18}
ALL = [*HOSTS, *CIFAR, "dsnet29", "dsnet50_cifar"]
BIG = ["dsnet101", "dsnet152", "dsnext101_32x8d", "wide_dsnet50_2", "ds2net101", "ds2net152", "dsnet110"]
# One network of each kind of block and stem; those that differ from another one by their depth alone tell no more.
QUICK = ["dsnet18", "dsnet26", "ds2res2net50", "dsnet20", "dsnet29"]
SWEPT = [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in ("dsnext50_32x4d", "se_dsnet50", "ds2net50"))]
SWEPT += [pytest.param("dsnet50_cifar", marks=pytest.mark.long)]
SIDE = 32


def images(name: str, batch: int = 2, channels: int = 3) -> Tensor:
    side = 16 if name in CIFAR or name in ("dsnet29", "dsnet50_cifar") else SIDE
    return torch.randn(batch, channels, side, side)


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **({"num_classes": 4} | kwargs))


def stages_of(name: str) -> int:
    return 3 if name in CIFAR or name == "dsnet29" else 4


def assert_every_parameter_has_a_gradient(net: nn.Module, output: Tensor | list[Tensor]) -> None:
    outputs = [output] if isinstance(output, Tensor) else output
    torch.stack([o.square().mean() for o in outputs]).sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.fixture(scope="module", params=SWEPT)
def swept(request) -> tuple[str, nn.Module]:
    """One network with random gammas for the tests that only run it, in evaluation mode."""
    net = create(request.param)
    randomise(net, seed=1)
    return request.param, net.eval()


def test_the_family_is_registered_whole():
    assert sorted(ds.list_models()) == sorted(ALL)
    assert all(timm.is_model(name) for name in ALL)


def test_list_models_says_what_each_network_can_do():
    assert set(ds.list_models(features_only=True)) == set(ALL)
    assert ds.list_models(features_only=False) == []
    inner = {"ds2net50", "ds2net101", "ds2net152", "ds2res2net50"}
    assert set(ds.list_models(inner=True)) == inner
    assert set(ds.list_models(inner=False)) == set(ALL) - inner
    assert set(ds.list_models(output_stride=True)) == set(HOSTS)
    assert set(ds.list_models("ds2*")) == inner
    assert ds.list_models("dsnet1*", output_stride=False) == ["dsnet110"]
    assert ds.list_models("nothing*") == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in BIG else []) for n in ALL])
def test_forward_and_backward_give_finite_logits_and_a_gradient_for_every_parameter(name):
    net = create(name)
    logits = net(images(name))
    assert logits.shape == (2, 4) and logits.isfinite().all()
    assert_every_parameter_has_a_gradient(net, logits)
    assert all(isinstance(getattr(net, f"layer{n}"), ds.DenseStage) for n in range(1, stages_of(name) + 1))


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_host_twin_is_timms_network_parameter_by_parameter(name):
    with torch.device("meta"):
        net, host = timm.create_model(name), timm.create_model(HOSTS[name])
    added = {n for n, _ in ds.shortcut_parameters(net)}
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters() if n not in added}
    assert shapes == {n: tuple(p.shape) for n, p in host.named_parameters()}
    expected = sum(len(s) * (len(s) + 1) // 2 * net.feature_info[i]["num_chs"] for i, s in stages(net))
    outer = sum(p.numel() for n, p in ds.shortcut_parameters(net) if ".inner." not in n)
    assert outer == expected
    ds.unplug(net)
    assert list(net.state_dict()) == list(host.state_dict())


def stages(net: nn.Module) -> list[tuple[int, ds.DenseStage]]:
    return [(n, getattr(net, f"layer{n}")) for n in range(1, 5)]


@pytest.mark.parametrize("name", ["dsnet18", "dsnet26", "dsnext50_32x4d", "se_dsnet50", "ds2res2net50"])
def test_same_seed_gives_the_host_twin_timms_own_weights_and_output(name):
    net, host = create(name), create(HOSTS[name], zero_init_last=False)
    ds.unplug(net)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), host.state_dict().values(), strict=True))
    x = images(name)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), host.eval()(x))


@pytest.mark.parametrize("name", sorted(CIFAR))
def test_cifar_networks_have_the_depth_and_widths_of_their_name(name):
    net, n = create(name, num_classes=10), CIFAR[name]
    assert 6 * n + 2 == int(name.removeprefix("dsnet"))
    widths = (16, 32, 64)
    blocks = [9 * a * b + 9 * b * b + 4 * b for b in widths for a in [b] * (n - 1)]  # two 3x3 and their norms
    heads = [9 * a * b + 9 * b * b + 4 * b for a, b in ((16, 16), (16, 32), (32, 64))]
    projections = [a * b + 2 * b for a, b in ((16, 32), (32, 64))]
    stem, classifier = 3 * 9 * 16 + 2 * 16, 64 * 10 + 10
    shortcuts = n * (n + 1) // 2 * sum(widths)
    count = sum(p.numel() for p in net.parameters())
    assert count == stem + sum(blocks) + sum(heads) + sum(projections) + classifier + shortcuts
    with torch.no_grad():
        assert net.eval().forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 64, 8, 8)
    assert net.default_cfg["input_size"] == (3, 32, 32)


def test_dsnet29_has_the_depth_and_widths_of_resnet_164s_family():
    net = create("dsnet29", num_classes=100)
    convolutions = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convolutions) + 1 == 9 * 3 + 2
    assert [s.shortcut.channels for s in (net.layer1, net.layer2, net.layer3)] == [64, 128, 256]
    assert sum(w.numel() for _, w in ds.shortcut_parameters(net)) == 6 * (64 + 128 + 256)
    with torch.no_grad():
        assert net.eval().forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 256, 8, 8)


def test_dsnet50_cifar_keeps_the_resolution_in_its_stem():
    net = create("dsnet50_cifar", num_classes=100)
    assert net.conv1.weight.shape == (64, 3, 3, 3) and net.conv1.stride == (1, 1)
    with torch.no_grad():
        assert net.eval().forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 2048, 4, 4)
    host = ds.unplug(net)
    assert sum(p.numel() for p in host.parameters()) == 23_705_252  # ResNet-50 with a 3x3 stem, 100 classes


def test_no_norm_is_taken_by_its_name_for_timm_drops_keywords_that_are_none():
    net = timm.create_model("dsnet20", norm="none")
    stages = ds.dense_stages(net).values()
    assert len(stages) == 3 and all(len(stage.shortcut.norms) == 0 and stage.shortcut.weights for stage in stages)


def test_plug_in_options_are_taken_as_keywords():
    net = create("dsnet20", norm="batch", aggregate="block", init="uniform", num_classes=7)
    assert net.fc.out_features == 7
    assert net.layer1.aggregate == "block"
    assert all(type(n) is nn.BatchNorm2d for n in net.layer3.shortcut.norms)
    assert_close(net.layer2.shortcut.weights[2], torch.full((3, 32), 1 / 3).double(), 1e-6, "start")
    assert any(".inner." in name for name, _ in ds.shortcut_parameters(create("dsnet26", inner=True)))
    assert not any(".inner." in name for name, _ in ds.shortcut_parameters(create("ds2net50", inner=False)))
    with pytest.raises(ds.DenseShortcutError, match="'grup'"):
        create("dsnet20", norm="grup")


@pytest.mark.parametrize("name", ["dsnet18", "dsnet20"])
def test_device_and_dtype_arguments_reach_the_shortcuts(name):
    net = create(name, dtype=torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert {p.device.type for p in create(name, device="meta").parameters()} == {"meta"}


# The surface of timm's ResNet -----------------------------------------------------------------------------------------


def test_forward_is_forward_features_then_head(swept):
    name, net = swept
    x = images(name)
    with torch.no_grad():
        features = net.forward_features(x)
        assert features.shape[1] == net.num_features
        assert torch.equal(net.forward_head(features), net(x))
        assert net.forward_head(features, pre_logits=True).shape == (2, net.num_features)


def test_forward_intermediates_end_with_forward_features(swept):
    name, net = swept
    x = images(name)
    with torch.no_grad():
        final, maps = net.forward_intermediates(x)
        assert torch.equal(final, net.forward_features(x)) and torch.equal(maps[-1], final)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in net.feature_info]


def test_gradient_checkpointing_runs_each_block_and_keeps_loss_and_gradients(swept, monkeypatch):
    name, net = swept
    net.train()
    x = images(name).requires_grad_()
    calls, convolutions = [], []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    hook = net.layer2[1].conv1.register_forward_hook(lambda *_: convolutions.append(1))

    def run(enable: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        x.grad = None
        loss = net(x).square().mean()
        loss.backward()
        return loss.detach(), x.grad, {n: p.grad.clone() for n, p in net.named_parameters()}

    plain = run(False)
    assert (len(calls), len(convolutions)) == (0, 1)
    recomputed = run(True)
    blocks = sum(len(getattr(net, f"layer{n}")) for n in range(1, stages_of(name) + 1))
    assert (len(calls), len(convolutions)) == (blocks, 3)
    hook.remove()
    net.set_grad_checkpointing(False)
    net.eval()
    assert torch.equal(plain[0], recomputed[0])
    assert_close(recomputed[1], plain[1].double(), 1e-6, "gradient of the input")
    for n, gradient in plain[2].items():
        assert_close(recomputed[2][n], gradient.double(), 1e-6, n)


def test_state_dict_round_trip_keeps_the_output(swept):
    name, net = swept
    twin = timm.create_model(name, num_classes=4)
    assert twin.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, strict=True).missing_keys == []
    x = images(name)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), net(x))


def test_classifier_can_be_asked_for_and_reset(swept):
    name, net = swept
    x = images(name)
    assert net.get_classifier() is net.fc and net.get_classifier(name_only=True) == "fc"
    with torch.no_grad():
        net.reset_classifier(9, "max")
        assert net(x).shape == (2, 9) and net.num_classes == 9
        net.reset_classifier(0)
        assert torch.equal(net(x), net.forward_features(x).amax((2, 3)))
        net.reset_classifier(0, "")
        assert torch.equal(net(x), net.forward_features(x))
        net.reset_classifier(4, "avg")
        assert net(x).shape == (2, 4)


@pytest.mark.parametrize("name", SWEPT)
def test_features_only_gives_the_maps_of_the_whole_network_at_the_stated_channels_and_reductions(name):
    net = create(name)
    features = create(name, features_only=True)
    assert isinstance(features, FeatureListNet)
    twin = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
    features.load_state_dict(twin, strict=True)
    side = 64 if name in HOSTS else 32
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        maps = features.eval()(x)
        assert torch.equal(maps[-1], net.eval().forward_features(x))
    assert len(maps) == stages_of(name) + 1
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [side // m.shape[2] for m in maps] == features.feature_info.reduction()
    assert_every_parameter_has_a_gradient(features.train(), features(x))


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("out_indices", [(1,), (0, 2), (1, -2)], ids=str)
def test_cutting_leaves_no_parameter_without_a_gradient(name, out_indices):
    features = create(name, features_only=True, out_indices=out_indices)
    maps = features(images(name))
    assert len(maps) == len(out_indices)
    assert_every_parameter_has_a_gradient(features, maps[-1])


@pytest.mark.parametrize("name", ["dsnet18", "ds2net50"])
def test_pruning_to_an_intermediate_map_leaves_no_parameter_without_a_gradient(name):
    net = create(name)
    assert net.prune_intermediate_layers(2) == [3, 4]
    net = create(name)
    assert net.prune_intermediate_layers([2]) == [2]
    assert_every_parameter_has_a_gradient(net, net(images(name)))


@pytest.mark.parametrize("name", ["dsnet20", "dsnet29"])
def test_indices_of_intermediate_maps_count_the_stages_of_a_network_for_small_images(name):
    net, x = create(name).eval(), images(name)
    with torch.no_grad():
        maps = net.forward_intermediates(x, intermediates_only=True)
        assert len(maps) == 4
        for index in (0, 1, 3, -1, -3):
            (alone,) = net.forward_intermediates(x, [index], stop_early=True, intermediates_only=True)
            assert torch.equal(alone, maps[index])
        assert all(map(torch.equal, net.forward_intermediates(x, 2, intermediates_only=True), maps[2:]))
    for refused in ([4], [-5], 5):
        with pytest.raises(AssertionError, match="out of range"):
            net.forward_intermediates(x, refused)
        with pytest.raises(AssertionError, match="out of range"):
            net.prune_intermediate_layers(refused)


@pytest.mark.parametrize(("index", "left"), [(-1, 3), (3, 3), (-2, 2), (1, 1)])
def test_pruning_a_network_for_small_images_keeps_the_map_and_what_is_before_it(index, left):
    net, x = create("dsnet20").eval(), images("dsnet20")
    with torch.no_grad():
        expected = net.forward_intermediates(x, intermediates_only=True)[index]
        assert net.prune_intermediate_layers([index]) == [left]
        assert torch.equal(net(x), expected)
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3)] == [3] * left + [0] * (3 - left)
    assert net.num_features == expected.shape[1] and isinstance(net.fc, nn.Identity)


def test_checkpointing_of_a_cut_network_runs_and_keeps_its_gradients(monkeypatch):
    import timm.models._features as module

    calls = []
    real = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    features = create("dsnet18", features_only=True)
    randomise(features, seed=1)
    gradients = []
    x = torch.randn(2, 3, 64, 64)
    for enable in (False, True):
        features.set_grad_checkpointing(enable)
        features.zero_grad()
        torch.stack([m.square().mean() for m in features(x)]).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in features.named_parameters()})
    assert len(calls) > 0
    for n, gradient in gradients[0].items():
        assert_close(gradients[1][n], gradient.double(), 1e-6, n)


@pytest.mark.parametrize("name", SWEPT)
def test_input_channels_and_pooling_are_taken(name):
    net = create(name, in_chans=5, global_pool="catavgmax").eval()
    x = images(name, channels=5)
    with torch.no_grad():
        features = net.forward_features(x)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        assert_close(net.forward_head(features, pre_logits=True), pooled.double(), 1e-6, "pooled")
        assert_close(net(x), net.fc(pooled).double(), 1e-5, "logits")


@pytest.mark.parametrize("name", SWEPT)
def test_drop_path_drops_branches_in_training_only(name):
    net = create(name, drop_path_rate=0.5)
    randomise(net, seed=1)
    rates = [block.drop_path.drop_prob for block in net.modules() if getattr(block, "drop_path", None) is not None]
    assert max(rates) == 0.5 and rates == sorted(rates)
    x = images(name)
    plain = create(name)
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        # to rounding: without drop path the branch's last norm joins the pass that adds the shortcuts
        torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
        net.train()
        torch.manual_seed(1)
        one = net(x)
        torch.manual_seed(2)
        assert not torch.equal(net(x), one)
    torch.manual_seed(3)
    assert_every_parameter_has_a_gradient(net, net(x))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["dsnet18", "ds2res2net50", pytest.param("dsnext50_32x4d", marks=pytest.mark.long)])
def test_output_stride_is_kept_and_every_parameter_trains(name, stride):
    net = create(name, output_stride=stride)
    x = torch.randn(2, 3, 32, 32)
    features = net.forward_features(x)
    assert features.shape[2:] == (32 // stride, 32 // stride)
    assert net.feature_info[-1]["reduction"] == stride
    assert_every_parameter_has_a_gradient(net, net.forward_head(features))


@pytest.mark.parametrize("name", [*CIFAR, "dsnet50_cifar"])
def test_output_stride_of_a_cifar_network_is_refused(name):
    with pytest.raises(ds.DenseShortcutError, match="output_stride"):
        create(name, output_stride=8)


@pytest.mark.parametrize("name", ["dsnet18", "dsnet20", "ds2res2net50"])
def test_registered_networks_are_timms_resnet(name):
    assert isinstance(create(name), ResNet)


def lr_scales(net: nn.Module) -> dict[int, float]:
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(net, layer_decay=0.5)
    return {id(p): group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["dsnet18", "ds2net50"])
def test_layer_decay_counts_the_shortcut_into_a_block_with_the_block(name):
    """Otherwise layer-wise decay would train the first stage's shortcuts at the classifier's rate."""
    net = create(name)
    for copied in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        scales = lr_scales(copied)
        for stage in (copied.layer1, copied.layer4):
            for block, weight in zip(stage.blocks, stage.shortcut.weights, strict=True):
                assert scales[id(weight)] == scales[id(block.conv1.weight)] < scales[id(copied.fc.weight)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("vit_tiny_patch16_224", "convnext_atto", "regnetx_002", "resnetv2_50", "dla34")),
        ("vit_tiny_patch16_224", {"every": 2}),
        *(
            pytest.param(name, {}, marks=pytest.mark.long)
            for name in (
                *("swin_tiny_patch4_window7_224", "convit_tiny", "efficientnet_b0", "cspresnet50"),
                *("xcit_nano_12_p8_224", "mobilenetv3_small_050"),
            )
        ),
    ],
)
def test_layer_decay_knows_the_blocks_of_every_family(name, options):
    with torch.device("meta"):
        net = ds.plug_in(timm.create_model(name), **options)
    names, scales = {id(p): n for n, p in net.named_parameters()}, lr_scales(net)
    assert len(scales) == len(names)
    by_name = {names[key]: scale for key, scale in scales.items()}
    for prefix, stage in ds.dense_stages(net).items():
        for row, shortcut in stage.shortcuts.items():
            summing = [k for k, maps in enumerate(shortcut.sources) if maps]
            for n, k in enumerate(summing):
                block = f"{prefix}.{stage.block_names[row.first + k]}."
                own = {scale for inside, scale in by_name.items() if inside.startswith(block)}
                assert by_name[f"{prefix}.{row.shortcut}.weights.{n}"] == max(own) < 1


def test_layer_decay_of_the_unplugged_network_is_the_hosts():
    net, host = create("dsnet18"), create("resnet18")
    ds.unplug(net)
    assert net.group_matcher() == host.group_matcher() and net.group_matcher(True) == host.group_matcher(True)
    assert "group_matcher" not in vars(net)
    assert list(lr_scales(net).values()) == list(lr_scales(host).values())

"""ds.load: nothing is dropped in silence, and a refused load changes nothing."""

import logging
import pickle

import hosts
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dense_shortcuts as ds


def net_of(kind: str = "timm_bottleneck", *, seed: int = 0, **variant) -> nn.Module:
    """A plugged network (a host where variant is empty) with random numbers in all weights."""
    net = hosts.small_net(kind)
    hosts.randomise(net, seed=seed)
    return net if not variant else ds.plug_in(net, **variant)


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_untouched(net: nn.Module, before: dict[str, Tensor]) -> None:
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def refused(net: nn.Module, source, **options) -> str:
    before = values(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.load(net, source, **options)
    assert_untouched(net, before)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_hosts_weights_load_into_the_plugged_network_and_the_missing_shortcut_keys_come_back_at_their_start(caplog):
    host = net_of(seed=7)
    net = net_of(seed=8, norm="batch", inner=True)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=9)
    net(torch.randn(2, 3, 9, 7))  # which moves the statistics of the shortcuts' norms
    with caplog.at_level(logging.INFO, logger="dense_shortcuts"):
        missing = ds.load(net, host.state_dict())
    added = [key for key in net.state_dict() if key not in host.state_dict()]
    assert sorted(missing) == sorted(added)
    assert all(key in caplog.text for key in added)
    fresh = values(ds.plug_in(net_of(seed=8), norm="batch", inner=True))
    for name, value in net.state_dict().items():
        expected = fresh[name] if name in added else host.state_dict()[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("weighting", ["channel", "softmax", "gate"])
def test_a_network_from_the_meta_device_is_loaded_once_it_has_memory(weighting):
    host, variant = net_of(seed=7), {"norm": "batch", "inner": True, "weighting": weighting}
    net = ds.plug_in(net_of(seed=8).to("meta"), **variant)
    with pytest.raises(ds.DenseShortcutError, match=r"tensors of the network are on the meta device, .*to_empty"):
        ds.load(net, host.state_dict())
    net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.fill_(7)  # whatever is there
    missing = ds.load(net, host.state_dict())
    wanted = values(ds.plug_in(host, **variant))
    assert set(missing) < wanted.keys()
    assert_untouched(net, wanted)


def test_a_network_partly_on_the_meta_device_is_refused():
    net = net_of(seed=8, norm="batch")
    net.layer1.shortcut.norms[0].to("meta")
    with pytest.raises(ds.DenseShortcutError, match=r"such as layer1\.shortcut\.norms\.0\.running_mean"):
        ds.load(net, net_of(seed=7, norm="batch").state_dict())


def test_a_timm_checkpoint_loads_into_its_dsnet():
    host = timm.create_model("resnet18", num_classes=5)
    net = timm.create_model("dsnet18", num_classes=5)
    missing = ds.load(net, host.state_dict())
    assert sorted(missing) == sorted(set(net.state_dict()) - set(host.state_dict()))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in host.state_dict().items())


def test_a_plugged_networks_own_weights_load_whole_and_nothing_is_missing(caplog):
    source, net = net_of(seed=1, norm="batch", inner=True), net_of(seed=2, norm="batch", inner=True)
    hosts.randomise_parameters(ds.shortcut_parameters(source), seed=3)
    with caplog.at_level(logging.WARNING, logger="dense_shortcuts"):
        assert ds.load(net, source.state_dict()) == []
    assert caplog.text == ""
    assert_untouched(net, values(source))
    x = torch.randn(2, 3, 9, 7)
    assert torch.equal(net.eval()(x), source.eval()(x))


def test_weights_come_from_a_safetensors_file(tmp_path):
    source, net = net_of(seed=1, init="ones"), net_of(seed=2, init="ones")
    hosts.randomise_parameters(ds.shortcut_parameters(source), seed=3)
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    assert ds.load(net, tmp_path / "net.safetensors") == []
    assert_untouched(net, values(source))
    assert ds.load(net_of(seed=2, init="ones"), str(tmp_path / "net.safetensors")) == []


def test_the_keys_of_every_row_are_shortcut_keys():
    host, net = (timm.create_model("convit_tiny", depth=4, local_up_to_layer=2, embed_dim=8, num_heads=2) for _ in "ab")
    state = ds.plug_in(net).state_dict()
    assert {"blocks.shortcut.weights.0", "blocks.shortcut2.weights.1"} < state.keys()
    assert ds.load(host, state, shortcuts="drop") == []
    assert all(torch.equal(value, state[key]) for key, value in host.state_dict().items())


def test_shortcut_keys_that_a_host_has_no_place_for_are_refused_by_name_or_dropped_on_request(caplog):
    source, host = net_of(seed=1, norm="batch", inner=True), net_of(seed=2)
    extra = [key for key in source.state_dict() if key not in host.state_dict()]
    text = refused(host, source.state_dict())
    assert all(key in text for key in extra)
    assert "drop" in text
    with caplog.at_level(logging.INFO, logger="dense_shortcuts"):
        ds.load(host, source.state_dict(), shortcuts="drop")
    assert all(key in caplog.text for key in extra)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in host.state_dict().items())


def test_inner_weights_that_the_network_has_no_place_for_are_refused_by_name_or_dropped_on_request():
    source, net = net_of(seed=1, inner=True), net_of(seed=2, inner=False)
    hosts.randomise_parameters(ds.shortcut_parameters(source), seed=3)
    text = refused(net, source.state_dict())
    assert "layer1.0.inner.weight" in text and "layer2.1.inner.weight" in text
    assert "layer1.shortcut.weights.0" not in text
    ds.load(net, source.state_dict(), shortcuts="drop")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in net.state_dict().items())


def test_statistics_of_another_norm_are_never_mixed_in_silently():
    batch, group = net_of(seed=1, norm="batch"), net_of(seed=2, norm="group")
    assert "layer1.shortcut.norms.0.running_mean" in refused(group, batch.state_dict())
    before = values(batch)
    try:
        missing = ds.load(batch, group.state_dict())
    except ds.DenseShortcutError as error:
        assert "layer1.shortcut.norms.0.running_mean" in str(error)
        assert_untouched(batch, before)
    else:
        assert "layer1.shortcut.norms.0.running_mean" in missing


@pytest.mark.parametrize("options", [{}, {"shortcuts": "drop"}], ids=str)
def test_a_missing_host_key_is_refused_by_name(options):
    for net in (net_of(seed=1), net_of(seed=1, norm="batch")):
        state = values(net)
        del state["layer1.0.conv1.weight"], state["fc.bias"]
        text = refused(net, state, **options)
        assert "layer1.0.conv1.weight" in text and "fc.bias" in text


@pytest.mark.parametrize("options", [{}, {"shortcuts": "drop"}], ids=str)
def test_an_unexpected_host_key_is_refused_by_name(options):
    net = net_of(seed=1, norm="batch")
    state = values(net) | {"layer9.0.conv1.weight": torch.zeros(1), "layer1.0.extra": torch.zeros(1)}
    text = refused(net, state, **options)
    assert "layer9.0.conv1.weight" in text and "layer1.0.extra" in text


@pytest.mark.parametrize("key", ["fc.weight", "layer1.shortcut.weights.1", "layer1.shortcut.norms.0.running_var"])
@pytest.mark.parametrize("options", [{}, {"shortcuts": "drop"}], ids=str)
def test_another_shape_is_refused_by_name(key, options):
    net = net_of(seed=1, norm="batch")
    state = {name: value + 1 for name, value in values(net).items()}
    state[key] = torch.zeros(*state[key].shape, 2)
    assert key in refused(net, state, **options)


def test_a_shape_that_would_broadcast_is_refused_by_name():
    net = net_of(seed=1, norm="batch")
    state = values(net)
    state["layer1.shortcut.weights.1"] = state["layer1.shortcut.weights.1"][:1]
    assert "layer1.shortcut.weights.1" in refused(net, state)


def test_another_networks_checkpoint_is_refused():
    net, other = timm.create_model("dsnet20", num_classes=5), timm.create_model("dsnet32", num_classes=5)
    text = refused(net, other.state_dict())
    assert "layer1.3.conv1.weight" in text


def test_a_part_of_the_shortcut_keys_is_not_taken_for_a_hosts_weights():
    net = net_of(seed=1, norm="group")
    state = values(net)
    del state["layer1.shortcut.weights.2"]
    before = values(net)
    try:
        missing = ds.load(net, state)
    except ds.DenseShortcutError as error:
        assert "layer1.shortcut.weights.2" in str(error)
        assert_untouched(net, before)
    else:
        assert missing == ["layer1.shortcut.weights.2"]


def test_an_unknown_choice_is_refused():
    net = net_of(seed=1, norm="batch")
    assert "'maybe'" in refused(net, values(net), shortcuts="maybe")


@pytest.mark.parametrize("size", [0, 4, 100, 2000])
def test_a_truncated_file_is_refused(tmp_path, size):
    net = net_of(seed=1, norm="batch")
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    assert "net.safetensors" in refused(net, path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    net = net_of(seed=1, norm="batch")
    assert "none.safetensors" in refused(net, tmp_path / "none.safetensors")
    refused(net, tmp_path)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return open, (self.mark, "w")


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.bin"])
def test_a_pickle_is_refused_and_never_unpickled(tmp_path, name):
    net, mark = net_of(seed=1, norm="batch"), tmp_path / "mark"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(str(mark))))
    assert name in refused(net, tmp_path / name)
    assert not mark.exists()
    torch.save({"state": Bomb(str(mark))}, tmp_path / name)
    refused(net, tmp_path / name)
    assert not mark.exists()


def test_loading_keeps_the_networks_own_parameter_objects_and_dtype():
    net = net_of(seed=1, norm="batch").double()
    objects = {name: id(p) for name, p in net.named_parameters()}
    ds.load(net, net_of(seed=2, norm="batch").state_dict())
    assert {name: id(p) for name, p in net.named_parameters()} == objects
    assert {p.dtype for p in net.parameters()} == {torch.float64}


@pytest.mark.parametrize("variant", [{"norm": "batch", "inner": True}, {"aggregate": "dense_identity"}], ids=str)
def test_state_dict_round_trip_reproduces_the_output_bit_for_bit(variant):
    source, net = net_of(seed=1, **variant), net_of(seed=2, **variant)
    hosts.randomise_parameters(ds.shortcut_parameters(source), seed=3)
    source(torch.randn(4, 3, 9, 7))
    net.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 3, 9, 7)
    assert torch.equal(net.eval()(x), source.eval()(x))

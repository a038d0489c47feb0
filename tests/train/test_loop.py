"""The loop: it learns, it repeats, and every switch is seen to act."""

import math

import numpy as np
import pytest
import timm
import torch
from rich.console import Console

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.train import loop
from dense_shortcuts.experiments.train.checkpoint import CARD, WEIGHTS
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.display import Display
from dense_shortcuts.experiments.train.loop import METRICS, drop_later_lines, make_loader, read_metrics
from dense_shortcuts.experiments.train.network import (
    build_network,
    make_loss,
    make_optimizer,
    make_scheduler,
    network_label,
    parameter_groups,
    twin,
)
from dense_shortcuts.experiments.train.processes import make_accelerator
from dense_shortcuts.experiments.train.rerun import unclocked
from dense_shortcuts.experiments.train.states import state_path
from dense_shortcuts.files import read_tensors
from dense_shortcuts.nn.norms import TokenNorm


@pytest.fixture(scope="module")
def base(tiny, fit, tmp_path_factory) -> list[dict]:
    """The metrics of one epoch with no switch changed."""
    return fit(tiny(epochs=1), tmp_path_factory.mktemp("base"))


@pytest.mark.long
def test_a_short_run_learns_the_digits(fit, tmp_path):
    config = TrainConfig(img_size=8, crop_padding=1, limit_train=640, epochs=8, batch_size=32, lr=0.1)
    rows = fit(config, tmp_path)
    assert rows[-1]["test_top1"] > 70 and rows[-1]["test_loss"] < rows[0]["test_loss"]
    assert rows[-1]["train_loss"] < 0.75 * rows[0]["train_loss"]
    assert rows[-1]["test_top5"] > rows[-1]["test_top1"]
    assert all(0 < row["train_data_wait_share"] < 1 for row in rows)


def test_the_same_seed_gives_the_same_metrics_and_weights(tiny, fit, tmp_path):
    runs = [fit(tiny(drop_path=0.2, mixup=0.2, seed=seed), tmp_path / str(i)) for i, seed in enumerate((3, 3, 4))]
    assert unclocked(runs[0]) == unclocked(runs[1]) != unclocked(runs[2])
    weights = [(tmp_path / str(i) / WEIGHTS).read_bytes() for i in range(3)]
    assert weights[0] == weights[1] != weights[2]


def test_worker_processes_change_no_result(tiny, fit, tmp_path):
    settings = {"drop_path": 0.2, "cutmix": 1.0, "auto_augment": "rand-m5"}
    runs = [fit(tiny(workers=workers, **settings), tmp_path / str(workers)) for workers in (0, 2)]
    assert unclocked(runs[0]) == unclocked(runs[1])


def test_a_metrics_line_cut_short_is_dropped_and_one_broken_in_the_middle_is_told(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    drop_later_lines(path, 1)
    assert path.read_text() == '{"epoch": 1}\n'
    path.write_text('{"epo\n{"epoch": 2}\n')
    with pytest.raises(DenseShortcutError, match="line 1 of"):
        read_metrics(path)


def test_a_saved_state_of_another_network_is_refused_with_its_keys(tiny, fit, tmp_path):
    fit(tiny(epochs=1), tmp_path)
    (tmp_path / CARD).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DenseShortcutError, match=r"layer1\.shortcut\.weights\.0"):
        fit(tiny(epochs=2, aggregate="identity"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["dsnet20", "resnet18", "ds2net50"])
def test_only_weights_of_convolutions_and_linear_layers_decay(name):
    model = build_network(TrainConfig(model=name), 10)
    decayed, free = parameter_groups(model, 0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n, p in model.named_parameters() if p.ndim in (2, 4) and "shortcut" not in n and "inner" not in n
    }
    shortcuts = {n for n, _ in ds.shortcut_parameters(model)}
    assert shortcuts and shortcuts <= {names[id(p)] for p in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


@pytest.mark.parametrize("name", ["dsnet20", "resnet18"])
@pytest.mark.parametrize(
    ("norm", "cls"),
    [
        ("group", torch.nn.GroupNorm),
        ("batch", torch.nn.BatchNorm2d),
        ("layer", torch.nn.GroupNorm),
        ("instance", torch.nn.InstanceNorm2d),
        ("none", None),
    ],
)
def test_the_network_has_the_norm_of_its_configuration(norm, cls, name):
    model = build_network(TrainConfig(model=name, norm=norm), 10)
    for stage in ds.dense_stages(model).values():
        found = {(type(n), getattr(n, "num_groups", 0) == 1) for n in stage.shortcut.norms}
        assert found == ({(cls, norm == "layer")} if cls else set())


def test_weight_decay_alone_shrinks_convolutions_and_leaves_shortcut_weights(tiny):
    config = tiny(weight_decay=0.1, opt="momentum", momentum=0.0, lr=0.5)
    model = build_network(config, 10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(config, model).step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["conv1.weight"], before["conv1.weight"] * 0.95)
    assert all(torch.equal(after[n], before[n]) for n, _ in ds.shortcut_parameters(model))


def test_an_unknown_optimizer_or_model_is_told_in_one_sentence(tiny):
    with pytest.raises(DenseShortcutError, match="--opt 'sgdx'") as caught:
        make_optimizer(tiny(opt="sgdx"), torch.nn.Linear(2, 2))
    assert "\n" not in str(caught.value)
    with pytest.raises(DenseShortcutError, match="unknown model 'dsnet21': did you mean dsnet"):
        build_network(tiny(model="dsnet21"), 10)
    with pytest.raises(DenseShortcutError, match="VGG holds no residual blocks"):
        build_network(tiny(model="vgg11"), 10)
    with pytest.raises(DenseShortcutError, match="7 groups do not divide"):
        build_network(tiny(groups=7), 10)


def test_the_twin_asks_for_nothing_of_what_plugging_takes(tiny):
    asked = {"weighting": "softmax", "pattern": "powers", "window": 2, "inner_start": 0.5, "norm": "batch"}
    assert twin(tiny(**asked, init="uniform")) == tiny(aggregate="identity")


@pytest.mark.parametrize("model", ["dsnet20", "resnet18"])
def test_the_twin_starts_with_the_hosts_own_weights(tiny, model):
    config = tiny(model=model)
    dense, host = build_network(config, 10), build_network(twin(config), 10)
    assert network_label(config) == "stage-auto" and network_label(twin(config)) == "identity"
    own, shared = host.state_dict(), dense.state_dict()
    assert own.keys() < shared.keys() and all(torch.equal(v, shared[k]) for k, v in own.items())
    assert not ds.dense_stages(host) and len(ds.dense_stages(dense)) >= 3


def test_a_host_name_with_options_is_the_network_plugged_by_hand(tiny):
    config = tiny(model="resnet26", aggregate="block", norm="layer", init="uniform", inner=True)
    torch.manual_seed(0)
    options = {"aggregate": "block", "norm": "layer", "init": "uniform", "inner": True}
    expected = ds.plug_in(timm.create_model("resnet26", num_classes=10), **options).state_dict()
    built = build_network(config, 10).state_dict()
    assert built.keys() == expected.keys() and all(torch.equal(v, built[k]) for k, v in expected.items())


def test_norm_auto_is_layer_norm_for_tokens_and_batch_norm_for_maps(tiny):
    def shortcut_norms(model, norm):
        network = build_network(tiny(model=model, norm=norm), 10)
        return {type(norm) for stage in ds.dense_stages(network).values() for norm in stage.shortcut.norms}

    assert shortcut_norms("test_vit", "auto") == shortcut_norms("test_vit", "layer") == {TokenNorm}
    assert shortcut_norms("dsnet20", "auto") == shortcut_norms("dsnet20", "batch") == {torch.nn.BatchNorm2d}
    assert network_label(tiny(norm="auto")) == "stage-auto"


def test_the_learning_rate_warms_up_then_falls_as_a_cosine_by_steps():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = make_scheduler(TrainConfig(epochs=10, warmup_epochs=2, lr=1.0), optimizer, 5)
    rates = []
    for step in range(50):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates[:10], 1e-5 + (1 - 1e-5) * np.arange(10) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:], 0.5 * (1 + np.cos(math.pi * np.arange(10, 50) / 50)), rtol=1e-6)


def test_multistep_cuts_the_learning_rate_at_each_milestone():
    config = TrainConfig(epochs=6, warmup_epochs=0, lr=1.0, sched="multistep", milestones=(2, 4), decay_rate=0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(config, optimizer, 3)
    rates = []
    for step in range(18):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    # timm's schedule looks one step ahead, so each cut comes with the last step before its milestone.
    np.testing.assert_allclose(rates, [1.0] * 5 + [0.2] * 6 + [0.04] * 7)


def test_smoothing_and_mixup_give_the_losses_of_their_definitions():
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    loss, mix = make_loss(TrainConfig(smoothing=0.2), 4)
    assert mix is None
    expected = torch.nn.functional.cross_entropy(scores, labels, label_smoothing=0.2)
    torch.testing.assert_close(loss(scores, labels), expected)
    loss, mix = make_loss(TrainConfig(smoothing=0.0, mixup=1.0), 4)
    np.random.seed(0)
    _, target = mix(torch.ones(6, 3, 2, 2), labels)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    assert ((target > 0) & (target < 1)).any()
    torch.testing.assert_close(loss(scores, target), torch.nn.functional.cross_entropy(scores, target))


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.4},
        {"cutmix": 1.0},
        {"drop_path": 0.3},
        {"clip_grad": 0.01},
        {"auto_augment": "rand-m9"},
        {"flip": False},
        {"crop_padding": 0},
        {"smoothing": 0.0},
        {"precision": "bf16"},
        {"momentum": 0.5},
        {"opt": "adamw"},
        {"loss": "bce"},
        {"aug_repeats": 2},
        {"test_size": 12},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_training_switch_changes_the_result(base, tiny, fit, tmp_path, change):
    with_change = fit(tiny(epochs=1, **change), tmp_path)
    assert math.isfinite(with_change[0]["test_loss"])
    assert unclocked(base) != unclocked(with_change)


def test_bf16_runs_the_network_in_bfloat16(tiny, fit, tmp_path, monkeypatch):
    seen = []
    original = torch.nn.functional.conv2d

    def recording(x, weight, *args, **kwargs):
        out = original(x, weight, *args, **kwargs)
        if not x.is_meta:  # as where plugging in looks at the network
            seen.append(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", recording)
    fit(tiny(epochs=1, precision="bf16"), tmp_path)
    assert seen and set(seen) == {torch.bfloat16}


def test_gradient_checkpointing_recomputes_and_changes_no_result(base, tiny, fit, tmp_path, monkeypatch):
    import timm.models.resnet as host

    calls = []
    original = host.checkpoint_seq

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(host, "checkpoint_seq", counted)
    fit(tiny(epochs=1, limit_train=32), tmp_path / "plain")
    assert not calls
    checkpointed = fit(tiny(epochs=1, grad_checkpointing=True), tmp_path / "checkpointed")
    assert calls
    # The recomputed forward pass updates batch norm's running statistics a second time, so tests may differ.
    assert checkpointed[0]["train_loss"] == pytest.approx(base[0]["train_loss"], rel=1e-4)


def test_channels_last_reaches_the_network(tiny, fit, tmp_path, monkeypatch):
    formats = []
    original = torch.nn.functional.conv2d

    def recording(x, *args, **kwargs):
        if not x.is_meta:  # as where plugging in looks at the network
            formats.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return original(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", recording)
    fit(tiny(epochs=1, channels_last=True), tmp_path / "last")
    assert formats and formats[0]
    formats.clear()
    fit(tiny(epochs=1, channels_last=False), tmp_path / "first")
    assert formats and not any(formats)


def test_the_moving_average_is_what_is_tested_and_saved(tiny, fit, tmp_path):
    plain = fit(tiny(), tmp_path / "plain")
    averaged = fit(tiny(ema_decay=0.9), tmp_path / "averaged")
    assert averaged[-1]["train_loss"] == plain[-1]["train_loss"]
    assert averaged[-1]["test_loss"] != plain[-1]["test_loss"]
    tensors, _ = read_tensors(state_path(tmp_path / "averaged", 2))
    weights, _ = read_tensors(tmp_path / "averaged" / WEIGHTS)
    assert torch.equal(weights["fc.weight"], tensors["ema.fc.weight"])
    assert not torch.equal(weights["fc.weight"], tensors["model.fc.weight"])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_epoch(tiny, fit, tmp_path):
    with pytest.raises(DenseShortcutError, match=r"not finite in step \d of epoch 1: nothing was saved before"):
        fit(tiny(epochs=1, lr=1e30), tmp_path / "start")
    fit(tiny(epochs=1), tmp_path)
    before = state_path(tmp_path, 1).read_bytes()
    with pytest.raises(DenseShortcutError, match=r"in step \d of epoch 2: change lr .* from state-0001\.safetensors"):
        fit(tiny(epochs=2, lr=1e30), tmp_path)
    assert state_path(tmp_path, 1).read_bytes() == before and not state_path(tmp_path, 2).exists()
    assert [row["epoch"] for row in read_metrics(tmp_path / METRICS)] == [1]


def test_testing_counts_every_image_once_also_in_a_ragged_last_batch(tiny):
    config = tiny(limit_test=50, batch_size=32).resolved()
    data, accelerator = load_data(config), make_accelerator(config)
    network, loader = accelerator.prepare(build_network(config, 10), make_loader(data.test, config))
    figures, predicted = loop.test_network(network, loader, 10, accelerator)
    images = torch.stack([data.test[(0, i)][0] for i in range(50)])
    labels = torch.from_numpy(data.test.images.labels)
    with torch.no_grad():
        scores = network.eval()(images)
    assert torch.equal(predicted, scores.argmax(1))
    assert figures["top1"] == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())
    best = (scores.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert figures["top5"] == pytest.approx(100 * best)
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)


def test_the_display_shows_epoch_speed_loss_accuracy_and_time_left_in_a_terminal():
    console = Console(force_terminal=True, width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with Display(["identity", "stage-auto"], 4, console) as display:
        display.start("identity", 0)
        assert display.due
        display.step(0, 0.5, 321.0, 2.25)
        row = {"epoch": 1, "train_images_per_second": 300.0, "train_loss": 2.0, "test_top1": 33.3}
        display.epoch(row | {"train_data_wait_share": 0.1})
        display.step(1, 0.5, 321.0, 1.5)
    text = console.export_text()
    for expected in (
        "identity",
        "stage-auto",
        "waiting",
        "epoch 2/4",
        "321 images/s",
        "loss 1.500",
        "33.30 %",
        "left 0:",
    ):
        assert expected in text


def test_without_a_terminal_each_epoch_is_one_plain_line(capsys):
    with Display(["stage-auto"], 2, Console()) as display:
        display.start("stage-auto", 0)
        assert not display.due
        row = {"epoch": 1, "train_images_per_second": 300.0, "train_loss": 2.0, "test_top1": 33.3}
        display.epoch(row | {"train_data_wait_share": 0.1})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("stage-auto  epoch 1/2  300 images/s  loss 2.000  accuracy 33.30 %")


def test_binary_cross_entropy_counts_each_class_and_takes_mixed_targets_above_the_threshold_as_1():
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    loss, mix = make_loss(TrainConfig(loss="bce", smoothing=0.2), 4)
    assert mix is None
    smoothed = torch.nn.functional.one_hot(labels, 4) * 0.8 + 0.05
    torch.testing.assert_close(loss(scores, labels), binary(scores, smoothed))
    loss, mix = make_loss(TrainConfig(loss="bce", bce_threshold=0.3, smoothing=0.0, mixup=1.0), 4)
    mixed = torch.tensor([[0.7, 0.3, 0.0, 0.0]]).repeat(6, 1)
    torch.testing.assert_close(loss(scores, mixed), binary(scores, torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(6, 1)))
    assert mix is not None

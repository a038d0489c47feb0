"""Runs that start from weights: what goes into which network, what stays at its start, what is refused, and when."""

import json
import logging
import shutil
import signal
from pathlib import Path

import pytest
import timm
import tiny_network  # noqa: F401 (registers it)
import torch
from safetensors.torch import save_file
from small_run import TWINS

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train import loop
from dense_shortcuts.experiments.train.checkpoint import WEIGHTS
from dense_shortcuts.experiments.train.config import TrainConfig, read_yaml
from dense_shortcuts.experiments.train.fingerprint import file_fingerprint
from dense_shortcuts.experiments.train.network import build_network
from dense_shortcuts.experiments.train.pretrained import start_from, weights_file
from dense_shortcuts.experiments.train.rerun import differences
from dense_shortcuts.files import read_json, read_tensors

TINY = [
    *("--model=dsnet20", "--img-size=8", "--crop-padding=1", "--limit-train=64", "--limit-test=30"),
    *("--batch-size=32", "--warmup-epochs=0", "--lr=0.05", "--epochs=1", "--tracker=none"),
]
STILL = ("--lr=1e-30", "--weight-decay=0")  # training leaves every weight as it was, to float32


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with runs/host, a host trained on the digits 0 to 6, and runs/twins, a comparison on the same."""
    folder = tmp_path_factory.mktemp("made")
    flags = [*TINY, "--classes=0-6", "--output", str(folder)]
    assert main(["train", *flags, "--aggregate=identity", "--name=host"]) == 0
    assert main(["compare", *TWINS, *flags, "--name=twins"]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "runs")


def net(num_classes: int = 3, seed: int = 5, **settings):
    return build_network(TrainConfig(model="dsnet20", seed=seed, **settings), num_classes)


def state_after(model, given: str) -> tuple[dict, dict]:
    """The states of a network before and after it took weights."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_from(model, given)
    return before, model.state_dict()


@pytest.mark.parametrize(
    "settings", [{}, {"keep_identity": True}, {"norm": "batch"}, {"aggregate": "identity"}], ids=str
)
def test_a_hosts_weights_go_into_a_network_of_other_classes(settings, caplog):
    host = read_tensors(Path("runs/host/identity") / WEIGHTS)[0]
    before, after = state_after(net(**settings), "runs/host")
    added = after.keys() - host.keys()
    assert bool(added) == (settings.get("aggregate") != "identity")
    for key, value in after.items():
        kept = key in added or key in ("fc.weight", "fc.bias")
        assert torch.equal(value, before[key] if kept else host[key]), key
    assert "runs/host/identity/model.safetensors without its classifier (fc.weight, fc.bias)" in caplog.text
    assert all(key in caplog.text for key in added)


def test_a_host_that_was_plugged_at_zero_starts_with_its_hosts_features():
    plugged, host = net(keep_identity=True).eval(), net(aggregate="identity").eval()
    for model in (plugged, host):
        start_from(model, "runs/host")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(plugged.forward_features(images), host.forward_features(images))
    assert host.forward_features(images).abs().sum() > 0


def test_a_classifier_of_the_same_size_is_loaded_and_a_plugged_networks_shortcuts_are_too(caplog):
    source = read_tensors(Path("runs/twins/stage-auto") / WEIGHTS)[0]
    with caplog.at_level(logging.INFO, logger="dense_shortcuts"):
        before, after = state_after(net(7), "runs/twins/stage-auto")
    assert all(torch.equal(after[key], value) for key, value in source.items()) and after.keys() == source.keys()
    assert any(not torch.equal(before[key], value) for key, value in source.items() if "shortcut" in key)
    assert "without" not in caplog.text and "started from runs/twins/stage-auto" in caplog.text


def test_a_checkpoint_of_timms_own_goes_into_its_dsnet(tmp_path):
    host = timm.create_model("resnet18", num_classes=11)
    save_file(host.state_dict(), tmp_path / "resnet18.safetensors")
    model = build_network(TrainConfig(model="dsnet18"), 4)
    _, after = state_after(model, str(tmp_path / "resnet18.safetensors"))
    assert all(torch.equal(after[key], value) for key, value in host.state_dict().items() if not key.startswith("fc."))


def test_a_network_that_does_not_say_which_its_classifier_is_takes_all_weights_or_none(tmp_path):
    save_file(timm.create_model("tiny_resnet", num_classes=4).state_dict(), tmp_path / "tiny.safetensors")
    _, after = state_after(timm.create_model("tiny_resnet", num_classes=4), str(tmp_path / "tiny.safetensors"))
    assert torch.equal(after["fc.weight"], read_tensors(tmp_path / "tiny.safetensors")[0]["fc.weight"])
    with pytest.raises(DenseShortcutError, match=r"of another shape: fc\.bias, fc\.weight\.$"):
        start_from(timm.create_model("tiny_resnet", num_classes=3), str(tmp_path / "tiny.safetensors"))


def test_weights_are_found_by_run_network_and_file():
    file = Path("runs/host/identity/model.safetensors")
    assert weights_file("runs/host") == weights_file("runs/host/identity") == weights_file(str(file)) == file
    with pytest.raises(DenseShortcutError, match=r"runs/twins holds several networks \(identity, stage-auto\)"):
        weights_file("runs/twins")
    for nothing in ("runs", "nowhere"):
        with pytest.raises(DenseShortcutError, match=f"--weights {nothing} is neither a safetensors file nor"):
            weights_file(nothing)


def told(capsys) -> str:
    """The one sentence of a refusal."""
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsnet: error: ")]
    assert len(error) == 1 and error[0].endswith(".")
    return error[0]


def test_what_does_not_fit_is_told_before_a_folder_is_made(capsys):
    command = ["train", *TINY, "--classes=7-9", "--name=a"]
    wrong = Path("runs/wrong.safetensors")
    tensors = read_tensors(Path("runs/host/identity") / WEIGHTS)[0]
    for change, word in (
        ({"conv1.weight": torch.zeros(16, 4, 3, 3)}, "of another shape: conv1.weight"),
        ({"conv9.weight": torch.zeros(1)}, "unexpected: conv9.weight"),
    ):
        save_file(tensors | change, wrong)
        assert main([*command, "--weights", str(wrong)]) == 2
        assert word in told(capsys)
    save_file({key: value for key, value in tensors.items() if key != "bn1.weight"}, wrong)
    assert main([*command, "--weights", str(wrong)]) == 2
    assert "missing: bn1.weight" in told(capsys)
    wrong.write_bytes(b"no safetensors")
    assert main([*command, "--weights", str(wrong)]) == 2
    assert "is not a whole safetensors file" in told(capsys)
    assert main([*command, "--weights", "nowhere"]) == 2
    assert "--weights" in told(capsys)
    assert main([*command, "--weights", "runs/twins/stage-auto", "--aggregate=identity"]) == 2
    assert "layer1.shortcut.weights.0" in told(capsys)
    assert not Path("runs/a").exists()


@pytest.mark.long
def test_both_twins_start_from_the_hosts_weights_and_the_folder_says_which_they_were():
    assert main(["compare", "--seeds", "0", *TINY, *STILL, "--classes=7-9", "--weights=runs/host", "--name=a"]) == 0
    host = read_tensors(Path("runs/host/identity") / WEIGHTS)[0]
    for network in ("identity", "stage-auto"):
        trained = read_tensors(Path("runs/a") / network / WEIGHTS)[0]
        parameters = {name for name, _ in net(aggregate="identity").named_parameters()} - {"fc.weight", "fc.bias"}
        assert all(torch.equal(trained[key], host[key]) for key in parameters)
        assert trained["fc.weight"].shape == (3, 64)
    file = Path("runs/host/identity/model.safetensors").resolve()
    assert read_json(Path("runs/a/environment.json"))["weights"] == {
        "file": str(file),
        "content": file_fingerprint(file),
    }
    assert read_yaml(Path("runs/a/config.yaml")).weights == str(Path("runs/host").resolve())
    log = Path("runs/a/run.log").read_text()
    assert log.count("model.safetensors without its classifier (fc.weight, fc.bias)") == 2
    assert log.count("shortcut keys are not in the weights and stay at their start") == 1


@pytest.mark.long
def test_a_resumed_run_needs_the_weights_no_more_and_a_rerun_does(monkeypatch, capsys):
    command = ["train", *TINY, "--classes=7-9", "--weights=runs/host", "--epochs=2"]
    assert main([*command, "--name=whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", stops_after(loop.save_state, 1))
        assert main([*command, "--name=cut"]) == 130
    assert main(["rerun", "runs/whole"]) == 0
    assert json.loads(Path("runs/whole-rerun/rerun.json").read_text())["equal"]
    shutil.rmtree("runs/host")
    assert main(["train", "--resume", "runs/cut"]) == 0
    ours, theirs = ((Path("runs") / name / "stage-auto" / WEIGHTS).read_bytes() for name in ("cut", "whole"))
    assert ours == theirs
    capsys.readouterr()
    assert main(["rerun", "runs/whole", "--name=again"]) == 2
    assert "is neither a safetensors file nor" in told(capsys)


def stops_after(function, calls: int):
    """The function, with an interruption after so many calls."""
    left = [calls]

    def called(*arguments):
        function(*arguments)
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGINT)

    return called


def test_a_rerun_says_that_the_weights_were_others():
    before = {"weights": {"file": "a", "content": "x"}}
    assert "weights: content was x and is y" in differences(before, {"weights": {"file": "a", "content": "y"}})


def test_a_network_that_was_changed_and_trained_on_does_not_begin_from_the_weights_again():
    assert main(["train", *TINY, "--classes=7-9", "--weights=runs/host", "--name=a"]) == 0
    shutil.rmtree("runs/host")
    assert main(["renorm", "runs/a/stage-auto", "--norm=group", "--epochs=1", "--name=b"]) == 0
    assert read_yaml(Path("runs/b/config.yaml")).weights is None

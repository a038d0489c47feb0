"""Checkpoints: whole or not at all, back to the last bit, and refused with the keys named where they do not fit."""

import errno
import json
import math
import os
import pickle

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError, files
from dense_shortcuts.experiments.train.checkpoint import (
    CARD,
    WEIGHTS,
    crop_of,
    load_all,
    read_model,
    restore_training,
    training_state,
)
from dense_shortcuts.experiments.train.states import state_path
from dense_shortcuts.files import read_tensors, write_tensors, write_text

STATE = "state-0001.safetensors"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / STATE
    write_tensors(path, {"x": torch.ones(3)}, {"epoch": 1})
    before = path.read_bytes()

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(DenseShortcutError, match=r"No space left .* free some space and go on"):
        write_tensors(path, {"x": torch.zeros(3)}, {"epoch": 2})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [STATE]


def test_the_crop_is_the_cards_and_an_early_cards_is_its_datas():
    assert crop_of({"data": "imagefolder", "crop_pct": 0.95}) == 0.95
    assert [crop_of({"data": data}) for data in ("imagefolder", "parquet", "cifar100")] == [0.875, 0.875, 1.0]


def test_a_text_file_is_replaced_as_a_whole(tmp_path):
    write_text(tmp_path / "a.json", "old and longer")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path):
    tensors = {
        "strided": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(12),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([math.inf, -0.0, 1e-42]),
    }
    write_tensors(tmp_path / "t", tensors, {"epoch": 3, "text": "é", "list": [1, None, True]})
    back, about = read_tensors(tmp_path / "t")
    assert about == {"epoch": 3, "text": "é", "list": [1, None, True]}
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "rmsproptf"])
def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path, opt):
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
        return model, create_optimizer_v2(model, opt, lr=0.01, weight_decay=0.1), ModelEmaV3(model, decay=0.9)

    def step(model, optimizer, ema):
        model(torch.randn(5, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

    generator = torch.Generator().manual_seed(1)
    one = fresh()
    step(*one)
    tensors, about = training_state(one[0], one[1], one[2].module, None, torch.tensor([1, 0]))
    write_tensors(tmp_path / STATE, tensors, about)
    middle = generator.get_state()
    step(*one)

    two = fresh()
    restore_training(*read_tensors(tmp_path / STATE), two[0], two[1], two[2].module, None)
    generator.set_state(middle)
    step(*two)
    for first, second in ((one[0], two[0]), (one[2].module, two[2].module)):
        states = first.state_dict(), second.state_dict()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    states = [o.state_dict()["state"] for o in (one[1], two[1])]
    assert states[0].keys() == states[1].keys() and states[0]
    for i, entry in states[0].items():
        assert all(torch.equal(torch.as_tensor(entry[k]), torch.as_tensor(states[1][i][k])) for k in entry)


def test_a_state_of_another_optimizer_is_refused():
    model = nn.Linear(2, 2)
    saved = training_state(model, torch.optim.SGD(model.parameters()), None, None, torch.tensor([0]))
    with pytest.raises(DenseShortcutError, match="optimizer is another one"):
        restore_training(*saved, model, torch.optim.Adam(model.parameters()), None, None)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_told_in_one_sentence(tmp_path, kept):
    write_tensors(tmp_path / WEIGHTS, {"x": torch.randn(100)}, {})
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(DenseShortcutError, match="is not a whole safetensors file") as caught:
        read_tensors(tmp_path / WEIGHTS)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DenseShortcutError, match="is not a whole safetensors file"):
        read_tensors(tmp_path / WEIGHTS)
    assert not marker.exists()


def test_a_host_checkpoint_is_not_taken_for_a_finished_dsnet():
    dense = timm.create_model("dsnet20", num_classes=10, norm="group")
    host = ds.unplug(timm.create_model("dsnet20", num_classes=10))
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    with pytest.raises(DenseShortcutError, match=r"has no layer1\.shortcut\.weights\.0"):
        load_all(dense, host.state_dict())
    with pytest.raises(DenseShortcutError, match=r"layer1\.shortcut\.weights\.0"):
        load_all(host, dense.state_dict())
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())


def test_a_trained_folder_gives_its_network_back(tiny, fit, tmp_path):
    fit(tiny(data="digits", aggregate="block", norm="batch", ema_decay=0.5), tmp_path)
    model, card = read_model(tmp_path)
    tensors, _ = read_tensors(state_path(tmp_path, 2))
    state = model.state_dict()
    assert all(torch.equal(tensors[f"ema.{k}"], v) for k, v in state.items())
    assert any(not torch.equal(tensors[f"model.{k}"], v) for k, v in state.items())
    assert model.layer1.aggregate == "block" and isinstance(model.layer1.shortcut.norms[0], nn.BatchNorm2d)
    assert (card["num_classes"], card["classes"][3], card["img_size"]) == (10, "3", 8)


def test_weights_beside_the_card_of_another_network_are_refused_with_the_keys(tiny, fit, tmp_path):
    fit(tiny(epochs=1), tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps(card | {"shortcut": {"aggregate": "identity"}}))
    with pytest.raises(DenseShortcutError, match=r"layer1\.shortcut\.weights\.0"):
        read_model(tmp_path)
    (tmp_path / CARD).write_text(json.dumps({"model": "dsnet20"}))
    with pytest.raises(DenseShortcutError, match="lacks what a network is built from"):
        read_model(tmp_path)
    (tmp_path / CARD).write_text("{")
    with pytest.raises(DenseShortcutError, match="is not whole JSON"):
        read_model(tmp_path)


def test_the_checkpoint_is_plain_safetensors_with_the_models_own_keys(tiny, fit, tmp_path):
    fit(tiny(epochs=1), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == timm.create_model("dsnet20", num_classes=10).state_dict().keys()

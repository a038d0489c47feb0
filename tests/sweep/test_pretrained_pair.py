"""The pair of a pretrained host and the same host plugged: its recipes, and its commands at a tiny size."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from train.train_helpers import png, write_parquet

from dense_shortcuts import recipes
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.sweep.spec import read_sweep
from dense_shortcuts.experiments.train.checkpoint import WEIGHTS
from dense_shortcuts.experiments.train.config import class_numbers, read_yaml
from dense_shortcuts.files import read_tensors

PAIRS = {"pretrain-cpu": "pretrained-pair-cpu", "pretrain": "pretrained-pair"}
TINY = {"limit_train": 4, "limit_test": 4, "batch_size": 4, "epochs": 1, "warmup_epochs": 0, "img_size": 8}
TINY |= {"workers": 0, "tracker": "none", "model": "dsnet20", "lr": 1e-30, "weight_decay": 0.0, "precision": "no"}


@pytest.mark.parametrize("before", PAIRS)
def test_the_pair_starts_from_what_the_pretraining_leaves_and_sees_other_classes(before):
    pretraining, sweep = read_yaml(recipes.find(before)), read_sweep(recipes.find(PAIRS[before]))
    begun = [row.config for row in sweep.rows if row.config.weights]
    assert {config.weights for config in begun} == {f"{pretraining.output}/{pretraining.name}"}
    assert {(c.aggregate, c.keep_identity) for c in begun} == {("identity", False), ("stage", True), ("stage", False)}
    assert {(row.config.model, row.config.img_size) for row in sweep.rows} == {
        (pretraining.model, pretraining.img_size)
    }
    seen = class_numbers(pretraining.classes)
    for row in sweep.rows:
        assert sorted([*seen, *class_numbers(row.config.classes)]) == list(range(100))
    assert sweep.rows[0].config in begun and sweep.rows[0].config.aggregate == "identity"


@pytest.mark.parametrize("before", PAIRS)
def test_its_file_says_how_it_is_run(before):
    assert [command[:3] for command in commands(before)] == [
        ["train", "--recipe", before],
        ["sweep", PAIRS[before], "--data-dir"],
    ]


def commands(before: str) -> list[list[str]]:
    """The arguments of dsnet in the pair's own comment."""
    text = recipes.find(PAIRS[before]).read_text()
    return [shlex.split(each) for each in re.findall(r"^#   (?:\w+=\w+ )?dsnet (.+)$", text, re.MULTILINE)]


@pytest.mark.long
def test_the_commands_run_one_after_the_other_and_not_the_second_alone(monkeypatch, capsys):
    pretrain, sweep = commands("pretrain-cpu")
    cut = Path("cut")
    cut.mkdir()
    for name in ("pretrain-cpu", "pretrained-pair-cpu"):
        text = recipes.find(name).read_text()
        (cut / f"{name}.yaml").write_text(text.replace("seeds: [0, 1, 2]", "seeds: [0]"))
    monkeypatch.setattr(recipes, "FOLDER", cut)
    for part in ("train", "test"):
        write_parquet(Path("DIR"), part, [png(i, size=32) for i in range(8)], [0, 79, 33, 1, 80, 99, 81, 80])
    small = ["--set", *(f"{key}={value}" for key, value in TINY.items())]
    assert main([*sweep, *small]) == 2
    assert "--weights runs/pretrain-cpu is neither a safetensors file nor" in capsys.readouterr().err
    assert not Path("runs/pretrained-pair-cpu").exists()

    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    assert main([*pretrain, *flags]) == 0
    assert main([*sweep, *small]) == 0, capsys.readouterr().err
    host = read_tensors(Path("runs/pretrain-cpu/identity") / WEIGHTS)[0]
    cells = read_sweep(recipes.find("pretrained-pair-cpu")).cells()
    assert len(cells) == 7
    for cell in cells:
        (network,) = Path("runs/pretrained-pair-cpu", cell.key).glob(f"*/{WEIGHTS}")
        trained = read_tensors(network)[0]
        assert torch.equal(trained["conv1.weight"], host["conv1.weight"]) == (cell.config.weights is not None)
        assert trained["fc.weight"].shape[0] == 20

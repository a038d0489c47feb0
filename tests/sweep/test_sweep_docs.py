"""The commands of docs/sweeps.md, at a tiny size: two rows and one seed of each sweep, few and small images."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from train.train_helpers import png, write_parquet

import dense_shortcuts as ds
from dense_shortcuts import recipes, shipped
from dense_shortcuts.cli import main
from dense_shortcuts.commands import COMMANDS
from dense_shortcuts.experiments.sweep.spec import read_sweep
from dense_shortcuts.experiments.train.loop import METRICS, read_metrics

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
TINY = {"limit_train": 4, "limit_test": 4, "batch_size": 4, "epochs": 1, "warmup_epochs": 0, "img_size": 8}
TINY |= {"workers": 0, "tracker": "none"}


def commands() -> list[str]:
    found = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in
             block.splitlines()]  # fmt: skip
    return [line for line in found if line]


@pytest.fixture
def place(monkeypatch):
    """The recipes cut to two rows and one seed, generated images in DIR, and a finished run in runs/NAME."""
    cut = Path("cut")
    cut.mkdir()
    for path in recipes.FOLDER.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "grid" in content:
            content |= {"grid": content["grid"][:2], "seeds": content["seeds"][:1]}
        (cut / path.name).write_text(yaml.safe_dump(content))
    monkeypatch.setattr(recipes, "FOLDER", cut)
    for part in ("train", "test"):
        write_parquet(Path("DIR"), part, [png(i, size=32) for i in range(8)], list(range(8)))
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    assert main(["train", "--model", "dsnet20", *flags, "--name", "NAME"]) == 0


@pytest.mark.long
def test_every_command_of_the_guide_runs(place, capsys):
    assert {command.split()[1] for command in commands()} == {"sweep", "rerun"}
    small = [text for key, value in TINY.items() for text in ("--set", f"{key}={value}")]
    for command in commands():
        arguments = shlex.split(command)[1:]
        if arguments[0] == "sweep":
            arguments += ["--set", *small[1::2]]
        assert main(arguments) == 0, capsys.readouterr().err
    assert "2 runs: 2 done" in capsys.readouterr().out
    assert Path("runs/sweep-cpu/table.md").is_file() and Path("runs/NAME-rerun/rerun.json").is_file()


def test_commands_and_recipes_that_it_names_are_there():
    named = re.findall(r"dsnet sweep ([\w-]+)|--recipe ([\w-]+)", TEXT)
    assert {recipes.find("".join(each)).parent for each in named} == {recipes.FOLDER}
    for verb in re.findall(r"dsnet (\w+)", TEXT):
        assert verb in COMMANDS


def test_the_file_that_it_shows_reads(place):
    shown = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]
    Path("shown.yaml").write_text(shown)
    sweep = read_sweep(Path("shown.yaml"))
    assert [row.name for row in sweep.rows] == [
        "ResNet-50",
        "DSNet-50 norm=group",
        "DSNet-50 norm=batch",
        "ResNet-50, same budget",
        "DSNet-50, 200 epochs",
    ]


def test_the_public_forms_snippet_starts_every_weight_at_random():
    guide = (ROOT / "docs" / "what-public-code-does.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], "what-public-code-does.md", "exec"), names)
    weights = [w for stage in ds.dense_stages(names["net"]).values() for w in stage.shortcut.weights]
    assert len(weights) == 16 and all(w.abs().max() <= 1 and w.std() > 0.5 for w in weights)


@pytest.mark.parametrize("name", ["densenet121_cifar", "rdnet_tiny_cifar"])
def test_the_relatives_for_small_images_end_in_maps_of_4x4(name):
    model = timm.create_model(name, num_classes=7)
    images = torch.zeros(1, 3, 32, 32)
    assert model.forward_features(images).shape[2:] == (4, 4)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_results_say_what_the_network_in_the_package_reached():
    said = re.search(r"^([\d.]+) % of the 10,000 test images", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE)
    assert float(said[1]) == round(read_metrics(shipped.folder() / METRICS)[-1]["test_top1"], 2)

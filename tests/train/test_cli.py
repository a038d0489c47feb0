"""The command line: the installed command in a temporary folder, and what it leaves there."""

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import TWINS
from train_helpers import png, write_parquet

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main, parse
from dense_shortcuts.commands import COMMANDS
from dense_shortcuts.experiments.train.checkpoint import WEIGHTS
from dense_shortcuts.experiments.train.loop import read_metrics
from dense_shortcuts.experiments.train.rerun import unclocked
from dense_shortcuts.files import read_tensors

DSNET = Path(sys.executable).with_name("dsnet")
NETWORKS = ("identity", "stage-auto")
COMPARE = ["compare", *TWINS]
TINY = [
    *("--model=dsnet20", "--img-size=8", "--crop-padding=1", "--limit-train=96", "--limit-test=50"),
    *("--batch-size=32", "--warmup-epochs=0", "--lr=0.05", "--epochs=3"),
]
LONG = [*TINY[:-1], "--epochs=6"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENSE_SHORTCUTS_DATA", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two finished comparisons, tiny and long."""
    folder = tmp_path_factory.mktemp("made")
    for name, settings in (("tiny", TINY), ("long", LONG)):
        assert main([*COMPARE, *settings, "--output", str(folder), "--name", name]) == 0
    return folder


@pytest.fixture
def finished(made) -> Path:
    """A copy of the finished short comparison, in runs/a."""
    return Path(shutil.copytree(made / "tiny", "runs/a"))


def metrics(run: Path | str) -> dict[str, list[dict]]:
    return {name: unclocked(read_metrics(Path(run) / name / "metrics.jsonl")) for name in NETWORKS}


def weights(run: Path | str) -> dict[str, bytes]:
    return {name: (Path(run) / name / WEIGHTS).read_bytes() for name in NETWORKS}


def refused(arguments: list[str], capsys) -> str:
    """The sentence of a command that must end with code 2 and leave everything as it was."""
    before = contents()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert contents() == before
    assert error.startswith("dsnet: error: ") and error.count("\n") == 1 and error.endswith(".\n")
    return error


def contents() -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"folder" for p in Path().rglob("*")}


def test_compare_leaves_table_curves_configuration_metrics_and_checkpoints():
    done = subprocess.run([DSNET, *COMPARE, *TINY, "--name", "a"], capture_output=True, text=True, check=True)
    run = Path("runs/a")
    assert {p.name for p in run.iterdir()} == {
        "tensorboard", "config.yaml", "environment.json", "table.md", "table.json", "curves.png", "run.log", *NETWORKS
    }  # fmt: skip
    for name in NETWORKS:
        files = {p.name for p in (run / name).iterdir()}
        states = {f"state-{epoch:04d}.safetensors" for epoch in (2, 3)}
        record = {"shortcuts.jsonl"} if name != "identity" else set()
        assert files == {"metrics.jsonl", *states, *record, "model.safetensors", "model.json"}
    table = json.loads((run / "table.json").read_text())
    for row, name in zip(table["networks"], NETWORKS, strict=True):
        last = read_metrics(run / name / "metrics.jsonl")[-1]
        assert (row["network"], row["test_top1"], row["epochs"]) == (name, last["test_top1"], 3)
        assert row["test_top1_by_seed"] == [last["test_top1"]]
        assert row["parameters"] == sum(
            t.numel() for k, t in read_tensors(run / name / WEIGHTS)[0].items() if is_learned(k)
        )
        assert min(row["multiply_adds"], row["peak_bytes"], row["infer_images_per_second"]) > 0
    host, dense = (row["test_top1"] for row in table["networks"])
    (pair,) = table["paired"]
    assert (pair["first"], pair["second"]) == ("host", "dsnet")
    assert dense - host == pytest.approx(pair["difference"], abs=1e-4)

    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines if " epoch " in line] == [
        [name, "epoch", f"{epoch}/3"] for name in NETWORKS for epoch in (1, 2, 3)
    ]
    said = " ".join(done.stdout.split())
    assert len(table["verdict"]) == 3 and all(sentence in said for sentence in table["verdict"])
    recipe = shlex.quote(str(Path("runs/a/config.yaml").resolve()))
    assert lines[-1] == f"next: dsnet compare --recipe {recipe} --name a-seed-1 --seeds 1"
    assert lines[-2] == "with CIFAR-100 in a folder DIR: dsnet compare --recipe cifar100-cpu --data-dir DIR"
    assert done.stderr == ""
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["timm"] and environment["seed"] == 0 and environment["command"] == "compare"


@pytest.mark.long
def test_the_command_that_a_run_prints_as_the_next_step_runs_where_it_was_printed(tmp_path):
    """From a folder with a blank, with the environment's commands not on the path, and for a lone host too."""
    place = tmp_path / "a place"
    place.mkdir()
    outside = os.environ | {"PATH": os.defpath}
    settings = [*TINY, "--epochs=1", "--aggregate=identity", "--output=my runs", "--name=h"]
    command = shlex.join([str(DSNET), "train", *settings])
    for name in ("h-seed-1", "h-seed-2"):
        done = subprocess.run(command, shell=True, cwd=place, env=outside, capture_output=True, text=True, check=True)
        command = done.stdout.splitlines()[-1].removeprefix("next: ")
        assert f" --name {name} --seed " in command
    assert {path.name for path in (place / "my runs").iterdir()} == {"h", "h-seed-1"}


def test_compare_trains_three_networks_with_two_seeds_and_a_densenet_of_as_many_parameters(capsys):
    assert main(["compare", *TINY[:-1], "--epochs=1", "--name", "a"]) == 0
    run = Path("runs/a")
    labels = ("identity", "stage-auto", "densenet")
    scores = {
        label: [read_metrics(place / label / "metrics.jsonl")[-1]["test_top1"] for place in (run, run / "seed-1")]
        for label in labels
    }
    table = json.loads((run / "table.json").read_text())
    assert [row["name"] for row in table["networks"]] == ["host", "DSNet", "DenseNet"]
    for row in table["networks"]:
        assert row["test_top1_by_seed"] == scores[row["network"]]
        assert row["test_top1"] == pytest.approx(sum(scores[row["network"]]) / 2)
    dense, other = table["networks"][1:]
    assert other["parameters"] == pytest.approx(dense["parameters"], rel=0.03)
    assert [(pair["first"], pair["second"]) for pair in table["paired"]] == [
        ("host", "dsnet"), ("host", "densenet"), ("dsnet", "densenet")
    ]  # fmt: skip
    for pair in table["paired"]:
        rows = {name: row for name, row in zip(("host", "dsnet", "densenet"), table["networks"], strict=True)}
        gap = rows[pair["second"]]["test_top1"] - rows[pair["first"]]["test_top1"]
        assert pair["difference"] == pytest.approx(gap, abs=1e-4)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("config.yaml --name a-seed-2 --seeds 2 3")
    # the networks of the second seed are a run of their own for whatever reads one
    assert main(["eval", "runs/a/seed-1/densenet"]) == 0
    assert f"accuracy {scores['densenet'][1]:.2f} %" in capsys.readouterr().out
    assert main(["rerun", "runs/a", "--name", "b"]) == 0
    assert "seed-1/densenet: bit-equal" in capsys.readouterr().out


def is_learned(key: str) -> bool:
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.long
def test_an_interrupted_comparison_resumes_to_the_same_result(made):
    command = [DSNET, *COMPARE, *LONG, "--name", "cut"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("stage-auto  epoch 2/6" in line for line in process.stdout), process.communicate()[1]
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT
    assert error.strip() == "dsnet: interrupted: go on with `dsnet compare --resume runs/cut`."
    assert not Path("runs/cut/stage-auto/model.json").exists()

    assert main(["compare", "--resume", "runs/cut"]) == 0
    assert metrics("runs/cut") == metrics(made / "long")
    assert weights("runs/cut") == weights(made / "long")


def test_a_finished_comparison_that_is_resumed_trains_nothing_again(finished, capsys):
    before, times = weights(finished), [p.stat().st_mtime_ns for p in finished.rglob("*/*")]
    assert main(["compare", "--resume", "runs/a"]) == 0
    assert " epoch " not in capsys.readouterr().out
    assert weights(finished) == before and [p.stat().st_mtime_ns for p in finished.rglob("*/*")] == times


def test_eval_gives_the_last_accuracy_of_the_run(capsys):
    assert main(["train", *TINY, "--name", "a", "--ema-decay", "0.9"]) == 0
    capsys.readouterr()
    last = read_metrics(Path("runs/a/stage-auto/metrics.jsonl"))[-1]
    for checkpoint in ("runs/a/stage-auto", "runs/a/stage-auto/model.safetensors"):
        assert main(["eval", checkpoint]) == 0
        out = capsys.readouterr().out
        assert f"accuracy {last['test_top1']:.2f} %, top-5 {last['test_top5']:.2f} %" in out
        assert f"loss {last['test_loss']:.4f} on 50 test images" in out
    assert main(["eval", "runs/a/stage-auto", "--limit-test", "20"]) == 0
    assert "on 20 test images" in capsys.readouterr().out


def test_train_leaves_one_network(capsys):
    assert main(["train", *TINY, "--aggregate", "identity", "--name", "host"]) == 0
    assert {p.name for p in Path("runs/host").iterdir() if p.is_dir()} == {"identity", "tensorboard"}
    assert "% accuracy" in capsys.readouterr().out


def test_a_recipe_gives_the_defaults_and_flags_have_the_last_word():
    Path("r.yaml").write_text("epochs: 7\nlr: 0.3\nmilestones: [2, 4]\nsched: multistep\n")
    config = parse(["train", "--recipe", "r.yaml", "--lr", "0.1"]).config
    assert (config.epochs, config.lr, config.milestones, config.sched) == (7, 0.1, (2, 4), "multistep")
    assert parse(["compare", "--milestones", "3", "5", "--sched", "multistep"]).config.milestones == (3, 5)


def test_the_saved_configuration_is_a_recipe_for_the_same_run(finished):
    assert main(["train", "--recipe", "runs/a/config.yaml", "--output", "runs", "--name", "b"]) == 0
    assert unclocked(read_metrics(Path("runs/b/stage-auto/metrics.jsonl"))) == metrics(finished)["stage-auto"]


def test_a_run_folder_that_exists_is_refused_and_untouched(capsys):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/notes.txt").write_text("mine")
    assert "runs/a exists already: choose another --name" in refused([*COMPARE, *TINY, "--name", "a"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "dsnet21"], "unknown model 'dsnet21'"),
        (["train", "--model", "vgg11"], "holds no residual blocks"),
        (["train", "--groups", "7"], "7 groups do not divide"),
        (["train", "--groups", "4", "--norm", "batch"], "groups=4 requires norm='group'"),
        (["train", "--inner", "True"], "needs bottleneck blocks"),
        (["train", "--opt", "sgdx"], "--opt 'sgdx'"),
        (["train", "--limit-train", "10"], "fewer than one batch"),
        (["train", "--auto-augment", "nonsense"], "--auto-augment 'nonsense'"),
        (["compare", "--aggregate", "identity"], "is the host itself"),
        (["compare", "--networks", "host"], "must name two or all of host, dsnet and densenet"),
        (["compare", "--networks", "host", "densenet", "--model", "vit_tiny_patch16_224"], "has three to five stages"),
        (["compare", "--seeds", "1", "1"], "must be different whole numbers"),
        (["train", "--epochs", "0"], "--epochs is 0"),
        (["train", "--name", "a/b"], "not a plain folder name"),
        (["train", "--data", "cifar100"], "--data-dir DIR"),
        (["train", "--data", "imagefolder", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["train", "--recipe", "missing.yaml"], "missing.yaml is no file and no recipe: "),
        (["train", "--resume", "nowhere"], "nowhere is no run to resume"),
        (["train", "--resume", "nowhere", "--lr", "1"], "give no other flag beside it"),
        (["eval", "nowhere"], "nowhere is no checkpoint"),
        (["eval", "file.txt"], "file.txt is no checkpoint"),
        (["eval", "."], "cannot read model.json"),
        (["train", "--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["train", "--output", "file.txt"], "cannot make file.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_with_code_2_and_leaves_nothing(arguments, message, capsys):
    Path("file.txt").write_text("not a folder")
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--norm", "grup"], "argument --norm: 'grup' is none of group, batch, layer, instance, none, auto: "),
        (["train", "--epochs", "many"], "argument --epochs: 'many' is not a whole number: `dsnet train --help`"),
        (["train", "--lr", "high"], "argument --lr: 'high' is not a number: "),
        (["train", "--inner", "yes"], "argument --inner: 'yes' is not True or False: "),
        (["train", "--epoch", "3"], "unrecognized arguments: --epoch 3 (did you mean --epochs?): `dsnet train --help`"),
        (["train", "--batch_size=3"], "unrecognized arguments: --batch_size=3 (did you mean --batch-size?): "),
        (["compare", "--lr"], "argument --lr: expected one argument"),
        (["compare", "--recipe"], "argument --recipe: expected one argument"),
        (["eval"], "the following arguments are required: CHECKPOINT: `dsnet eval --help`"),
        (["prune", "shipped"], "the following arguments are required: --keep: "),
        (["info", "more"], "unrecognized arguments: more: `dsnet info --help`"),
        (["trian"], "argument COMMAND: invalid choice: 'trian' (choose from "),
        ([], "the following arguments are required: COMMAND: `dsnet --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_cannot_be_read_is_one_sentence_with_code_2(arguments, sentence, capsys):
    assert refused(arguments, capsys).startswith(f"dsnet: error: {sentence}")


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_has_help(word, capsys):
    with pytest.raises(SystemExit) as caught:
        main([word, "--help"])
    assert not caught.value.code and capsys.readouterr().out.startswith(f"usage: dsnet {word} ")


def test_flags_of_every_kind_are_read():
    command = parse(["train", "--inner", "True", "--no-channels-last", "--clip-grad", "None", "--layers", "2", "3"])
    config = command.config
    assert (config.inner, config.channels_last, config.clip_grad, config.layers) == (True, False, None, (2, 3))
    bench = parse(["bench", "--models", "a", "b", "--what", "infer", "--output", "x"]).config
    assert (bench.models, bench.what, bench.output) == (("a", "b"), ("infer",), Path("x"))
    seen = parse(["cam", "a.png", "b.png", "--pretrained", "--draw", "2"])
    assert (seen.images, seen.pretrained, seen.draw) == ((Path("a.png"), Path("b.png")), True, 2)
    assert parse(["models"]).pattern == "" and parse(["models", "ds2*"]).pattern == "ds2*"
    assert parse(["renorm", "shipped"]).training.epochs == 5
    assert parse(["prune", "shipped", "--keep", "1"]).training.epochs == 0
    assert parse(["renorm", "shipped", "--epochs", "2"]).training.epochs == 2
    sweep = parse(["sweep", "s.yaml", "--set", "epochs=2", "lr=0.1"])
    assert (sweep.file, sweep.set) == (Path("s.yaml"), ("epochs=2", "lr=0.1"))


def test_a_refusal_is_the_same_sentence_on_a_terminal():
    terminal, end = pty.openpty()
    done = subprocess.run([DSNET, "train", "--epoch", "3"], stdout=end, stderr=subprocess.PIPE, text=True)
    for descriptor in (terminal, end):
        os.close(descriptor)
    assert done.returncode == 2
    assert done.stderr == (
        "dsnet: error: unrecognized arguments: --epoch 3 (did you mean --epochs?): "
        "`dsnet train --help` lists what there is.\n"
    )


def test_help_is_printed_with_code_0(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    out, error = capsys.readouterr()
    assert not caught.value.code and not error
    assert "--keep-identity" in out and "Learning rate after the warm-up" in out


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [([png(0), b"broken"], [0, 1], "row 1 of"), ([png(0), png(1)], [0, 100], "the label 100")],
    ids=["image", "label"],
)
def test_broken_cifar_data_leaves_no_run(images, labels, message, capsys):
    folder = Path("data")
    write_parquet(folder, "train", [png(i) for i in range(4)], [0, 1, 2, 3])
    write_parquet(folder, "test", images, labels)
    assert message in refused(["train", "--data", "cifar100", "--data-dir", "data", "--batch-size", "2"], capsys)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_truncated_image_ends_the_run_with_its_name_where_none_may_be_broken(image_folder, workers, capsys):
    broken = image_folder / "train" / "bees" / "4.png"
    broken.write_bytes(broken.read_bytes()[:100])
    size = ["--img-size", "32", "--batch-size", "4", "--epochs", "2", "--name", "a", "--workers", workers]
    size += ["--max-broken", "0"]
    assert main(["train", "--data", "imagefolder", "--data-dir", str(image_folder), "--model", "dsnet20", *size]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dsnet: error: {broken} is not a whole image") and error.count("\n") == 1


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(finished, capsys):
    Path("runs/a/identity/model.json").write_bytes(Path("runs/a/stage-auto/model.json").read_bytes())
    assert "layer1.shortcut.weights.0" in refused(["eval", "runs/a/identity"], capsys)
    weights_file = Path("runs/a/stage-auto/model.safetensors")
    weights_file.write_bytes(weights_file.read_bytes()[:5000])
    assert "is not a whole safetensors file" in refused(["eval", "runs/a/stage-auto"], capsys)
    assert "go on with `dsnet compare --resume runs/a`" in refused(["train", "--resume", "runs/a"], capsys)


def test_a_broken_saved_configuration_is_told_on_resume(finished, capsys):
    Path("runs/a/config.yaml").write_text("epochs: 3\nepoch: 4\n")
    assert "unknown key 'epoch'" in refused(["compare", "--resume", "runs/a"], capsys)


def test_models_lists_the_family_by_pattern(capsys):
    assert main(["models", "ds2net*"]) == 0
    assert capsys.readouterr().out.split() == ["ds2net50", "ds2net101", "ds2net152"]


def test_the_real_cifar100_trains_from_its_parquet_files(cifar100, capsys):
    settings = [*TINY, "--img-size=32", "--epochs=1", "--workers=0"]
    assert main(["train", "--data", "cifar100", "--data-dir", str(cifar100), *settings, "--name", "a"]) == 0
    card = json.loads(Path("runs/a/stage-auto/model.json").read_text())
    assert card["num_classes"] == 100 and card["classes"][0] == "apple" and card["img_size"] == 32
    capsys.readouterr()


def test_the_recipe_reader_is_the_one_that_the_command_uses():
    Path("r.yaml").write_text("epoch: 7\n")
    with pytest.raises(DenseShortcutError, match="did you mean 'epochs'"):
        parse(["train", "--recipe", "r.yaml"])

"""A folder for the hub loads again, bit for bit, and its card says what the run measured and no more."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, hub
from huggingface_hub import HfApi

import dense_shortcuts as ds
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.checkpoint import read_model
from dense_shortcuts.export import from_pretrained, push_to_hub, save_for_hub


def scores(net: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return net.eval()(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("changes", [{"norm": "batch"}, {"keep_identity": True, "init": "ones"}], ids=str)
def test_timm_and_we_load_the_same_network(changes, checkpoint):
    source = checkpoint("dsnet20", **changes)
    assert main(["export", str(source), "--to", "hub"]) == 0
    folder = source / "hub"
    expected = scores(read_model(source)[0])
    ours = from_pretrained(folder)
    assert torch.equal(scores(ours), expected) and not ours.training
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(scores(theirs), expected)
    for net in (ours, theirs):
        config = timm.data.resolve_model_data_config(net)
        assert tuple(config["input_size"]) == (3, 8, 8) and config["mean"] == pytest.approx((0.305,) * 3)
    assert ours.pretrained_cfg["label_names"][7] == "7"


def test_a_network_that_timm_cannot_build_is_loaded_by_us_alone(checkpoint):
    source = checkpoint("tiny_resnet")
    folder = save_for_hub(source, source.parent / "upload")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.json", "README.md"}
    assert "timm.create_model" not in (folder / "README.md").read_text()
    assert torch.equal(scores(from_pretrained(folder)), scores(read_model(source)[0]))


def test_the_card_has_the_runs_own_figures(tmp_path, checkpoint):
    source = checkpoint("dsnet20", epochs=7, lr=0.25)
    (source.parent / "table.md").write_text("| network | accuracy, % |\n| --- | ---: |\n| net | 12.34 |\n")
    about = {"seed": 0, "device": "a machine", "packages": {"torch": "9.9"}}
    (source.parent / "environment.json").write_text(json.dumps(about))
    text = (save_for_hub(source) / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "timm" and "license" not in head
    assert "| net | 12.34 |" in text and "a machine, PyTorch 9.9" in text
    assert "lr: 0.25" in text and "epochs: 7" in text and str(tmp_path) not in text
    (source.parent / "table.md").unlink()
    (source / "metrics.jsonl").write_text(json.dumps({"epoch": 3, "test_top1": 43.21}) + "\n")
    assert "Accuracy 43.21 % on the test images after 3 epochs." in (save_for_hub(source) / "README.md").read_text()


USE = """
import sys
import timm, torch
import dense_shortcuts
from dense_shortcuts.export import from_pretrained, push_to_hub

address = push_to_hub(sys.argv[1], "me/net", private=True)
ours = from_pretrained("me/net")
theirs = timm.create_model("hf-hub:me/net", pretrained=True)
torch.save((address, ours.state_dict(), theirs.state_dict()), sys.argv[2])
"""


def test_a_push_goes_to_the_hub_and_loads_from_it_again(checkpoint, tmp_path):
    source = checkpoint("dsnet20")
    with hub() as server:
        settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        # The hub's other store, Xet, speaks a protocol of its own; without it large files go by Git LFS.
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", USE, str(source), str(tmp_path / "loaded.pt")]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (server.made["name"], server.made["organization"], server.made["visibility"]) == ("net", "me", "private")
    assert server.files.keys() == {"model.safetensors", "model.json", "config.json", "README.md"}
    assert server.stored and server.files["model.safetensors"] == (source / "model.safetensors").read_bytes()
    assert any(line.startswith("GET /me/net/resolve/") for line in server.asked)
    address, *loaded = torch.load(tmp_path / "loaded.pt")
    assert address == f"{server.address}/me/net/commit/{'c' * 40}"
    expected = read_model(source)[0].state_dict()
    for state in loaded:
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_a_push_that_the_hub_refuses_says_why(checkpoint):
    with hub() as server, pytest.raises(ds.DenseShortcutError, match=r"refused me/net .*401"):
        push_to_hub(checkpoint(), "me/net", api=HfApi(endpoint=server.address, token="hf_wrong"))
    assert server.files == {}


def test_what_is_no_network_of_ours_is_refused(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ds.DenseShortcutError, match=r"holds no model\.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ds.DenseShortcutError, match="cannot be loaded from the hub"):
        from_pretrained("nobody/nothing")
    with pytest.raises(ds.DenseShortcutError, match="cannot be loaded from the hub"):
        from_pretrained("no such/name/at/all")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ds.DenseShortcutError, match="holds other files"):
        save_for_hub(checkpoint(), tmp_path / "other")

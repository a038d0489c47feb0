"""What importing the package does to a process, seen in fresh ones."""

import json
import subprocess
import sys

HEAVY = (
    *("triton", "gradio", "onnx", "onnxruntime", "accelerate", "torchmetrics", "matplotlib", "rich"),
    *("sklearn", "pyarrow", "torch.utils.tensorboard"),
)
OF_COMMANDS = ("accelerate", "torchmetrics", "matplotlib", "gradio", "pytorch_grad_cam", "playwright")


def in_a_fresh_process(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_registers_the_networks_with_timm_and_loads_nothing_heavy():
    """What torch, torchvision and timm load by themselves is not the package's doing."""
    code = f"""
import json, sys
import timm, torch, torchvision
unknown = not timm.is_model("dsnet50")
before, threads, rng = set(sys.modules), torch.get_num_threads(), torch.get_rng_state()
forwards = timm.models.resnet.Bottleneck.forward, torchvision.models.resnet.Bottleneck.forward
import dense_shortcuts as ds
loaded = set(sys.modules) - before
quiet = torch.equal(torch.get_rng_state(), rng) and torch.get_num_threads() == threads
kept = forwards == (timm.models.resnet.Bottleneck.forward, torchvision.models.resnet.Bottleneck.forward)
net = timm.create_model("dsnet20")
after = set(sys.modules) - before
heavy = [m for m in {HEAVY!r} if m in loaded or m in after]
import dense_shortcuts.cli
of_commands = [m for m in {OF_COMMANDS!r} if m in sys.modules]
print(json.dumps(dict(
    unknown=unknown, known=sorted(n for n in ds.list_models() if timm.is_model(n)), heavy=heavy, quiet=quiet, kept=kept,
    of_commands=of_commands,
    training=[m for m in loaded if m.startswith("dense_shortcuts.experiments.train")],
    classes=net.fc.out_features, names=sorted(ds.__all__),
    missing=[n for n in ds.__all__ if not hasattr(ds, n)],
)))
"""
    seen = in_a_fresh_process(code)
    assert seen["unknown"] and seen["quiet"] and seen["kept"]
    assert len(seen["known"]) == 20 and "dsnet50" in seen["known"]
    assert seen["heavy"] == [] and seen["training"] == [] and seen["missing"] == []
    assert seen["of_commands"] == [], "a command loads what it needs as it runs"
    assert seen["classes"] == 100
    public = {"plug_in", "unplug", "plan", "check", "load", "list_models", "shortcut_parameters", "DenseShortcutError"}
    assert public <= set(seen["names"])


def test_the_stage_and_what_it_is_made_of_need_neither_timm_nor_torchvision():
    seen = in_a_fresh_process("""
import importlib.util, json, pathlib, sys, types
package = types.ModuleType("dense_shortcuts")  # without its __init__, which registers the networks
package.__path__ = list(importlib.util.find_spec("dense_shortcuts").submodule_search_locations)
sys.modules["dense_shortcuts"] = package
import dense_shortcuts.nn.stage
print(json.dumps(dict(loaded=sorted(name for name in ("timm", "torchvision") if name in sys.modules))))
""")
    assert seen["loaded"] == []

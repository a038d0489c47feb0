"""`dsnet info`: versions, devices, and the back end of each device with its reason."""

import timm
import torch

from dense_shortcuts.cli import main
from dense_shortcuts.experiments import environment as machine
from dense_shortcuts.ops import BACKENDS
from dense_shortcuts.ops.backend import VARIABLE, own_backend


def info(capsys) -> list[str]:
    assert main(["info"]) == 0
    return capsys.readouterr().out.splitlines()


def backend_line(lines: list[str], device: str = "cpu") -> str:
    return next(line for line in lines if line.startswith(f"{device} back end: "))


def test_info_names_versions_devices_and_the_back_end_in_use(capsys, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    lines = info(capsys)
    assert any(
        f"torch {torch.__version__.split('+')[0]}" in line and f"timm {timm.__version__}" in line for line in lines
    )
    assert any(line.startswith("cpu: ") and "threads" in line for line in lines)
    own, reason = own_backend("cpu")
    assert backend_line(lines).startswith(
        f"cpu back end: {own} ({reason}; under torch.compile plain, except in deep stages); could be chosen: "
    )
    assert "plain" in backend_line(lines) or own == "plain"
    assert any(line.startswith("cuda back end: ") for line in lines) == torch.cuda.is_available()


def test_info_follows_the_environment_variable(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "plain")
    line = backend_line(info(capsys))
    assert line.startswith(f"cpu back end: plain (set by {VARIABLE}); could be chosen: ")
    assert own_backend("cpu")[0] in line.split("chosen: ")[1]
    monkeypatch.setenv(VARIABLE, "nonsense")
    assert "nonsense names one that cannot run: unknown back end" in backend_line(info(capsys))


def test_every_back_end_either_runs_on_a_device_or_has_a_reason_why_not():
    runs = machine.backends("cpu")
    assert set(runs) == set(BACKENDS) - {"auto"}
    assert runs["plain"] == runs[own_backend("cpu")[0]] == ""
    assert all(refusal == "" or refusal.endswith(".") for refusal in runs.values())

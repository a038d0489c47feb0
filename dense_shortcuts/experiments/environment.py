"""What measured figures depend on besides the code: the machine, its software, and the back ends that run on it."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..errors import DenseShortcutError
from ..ops.backend import VARIABLE, own_backend

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "accelerate",
    "torchmetrics",
    "faster-coco-eval",
    "numpy",
    "pillow",
    "dense-shortcuts",
)


def machine() -> dict[str, Any]:
    """The machine, the versions and the state of the package's source, to be saved with figures."""
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_state(),
    }


def installed(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the CPU, and the widest vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        lines = described.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def git_state() -> dict[str, Any] | None:
    """Commit of the package's source tree, and whether it was changed since; None if the package is installed."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def devices() -> dict[str, str]:
    """Device types of this machine, each with the name of the device."""
    found = {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        found["mps"] = platform.machine()
    return found


def backends(device: str) -> dict[str, str]:
    """Every back end except "auto", with the reason it cannot run on a device type here, or "" if it can."""
    found = {}
    x = torch.empty(1, 1, 1, 1, device=device)
    for name in ops.BACKENDS:
        if name == "auto":
            continue
        try:
            ops.choose(x, name)
            found[name] = ""
        except DenseShortcutError as error:
            found[name] = str(error)
    return found


def info() -> list[str]:
    """What `dsnet info` prints, line by line."""
    packages = ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed(name)))
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}", packages]
    lines += [f"{device}: {name}" for device, name in devices().items()]
    return lines + [_backend_line(device) for device in devices()]


def _backend_line(device: str) -> str:
    """Which back end a device uses, why, and which others could be chosen."""
    runs = backends(device)
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted != "auto" and runs.get(wanted, "unknown"):
        reason = runs.get(wanted) or f"unknown back end: choose one of {', '.join(ops.BACKENDS)}."
        return f"{device} back end: none, because {VARIABLE}={wanted} names one that cannot run: {reason}"
    own, reason = own_backend(device)
    if device == "cpu":
        reason = f"{reason}; under torch.compile plain, except in deep stages"
    used, why = (own, reason) if wanted == "auto" else (wanted, f"set by {VARIABLE}")
    others = [name for name, refusal in runs.items() if not refusal and name != used]
    return f"{device} back end: {used} ({why}); could be chosen: {', '.join(others) or 'no other'}"

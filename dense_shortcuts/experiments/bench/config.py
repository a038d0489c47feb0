"""What a benchmark measures: one flat dataclass that is also the command line. The device decides what is left open."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import DenseShortcutError

What = Literal["train", "infer"]
Mode = Literal["eager", "compiled"]

_DSNETS = ("dsnet50/group", "dsnet50/batch", "dsnet152/group", "dsnet152/batch")  # their peers come with them
_BOTH: tuple[What, ...] = ("train", "infer")
# What the plain command measures, for which the goals are stated; images a step and modes are the networks' own.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": _DSNETS, "what": _BOTH, "image_size": (224,), "precision": "no", "rounds": 7},
    "cuda": {
        "models": ("torchvision.densenet121", *_DSNETS),
        "what": _BOTH,
        "image_size": (224,),
        "precision": "bf16",
        "rounds": 15,
    },
}
# Each network that is compiled takes from half a minute to two: under --gpu one norm, and training alone.
DEFAULTS["gpu"] = DEFAULTS["cuda"] | {
    "models": ("torchvision.densenet121", "dsnet50/group", "dsnet152/group"),
    "what": ("train",),
    "rounds": 7,
}
SWEEP_SIZE = {"cpu": 16, "cuda": 28}  # side of the feature maps of a depth sweep, in pixels


@dataclass(frozen=True)
class BenchConfig:
    """What is measured and how; what is left at None or empty is chosen by the device."""

    models: tuple[str, ...] = ()
    """Names or wildcards, such as timm.resnet50, 'plugged.*' or 'dsnet152/*'; '*' is everything."""
    depths: tuple[int, ...] = ()
    """Measure one stage of so many blocks for each number, not whole networks, and fit how the cost grows."""
    what: tuple[What, ...] = ()
    """Training step, inference, or both; empty is both, and under --gpu the training step."""
    modes: tuple[Mode, ...] = ()
    """As PyTorch runs it by itself, or through torch.compile; each is compared with its like.

    Empty is both on CUDA and for networks of depth 50, else eager."""
    device: Literal["cpu", "cuda"] | None = None
    """None is CUDA where there is one."""
    gpu: bool = False
    """Eight minutes of one NVIDIA card: hold the kernels to the reference, then measure what there is time for."""
    batch_size: int | None = None
    """Images a step; None is 8 on a CPU, 256 on CUDA, and half of it for all networks but those of depth 50.

    In a depth sweep it is 8, or 64 on CUDA."""
    image_size: tuple[int, ...] = ()
    """Sides of the square images in pixels, in a depth sweep those of the feature maps."""
    precision: Literal["no", "bf16"] | None = None
    """Mixed precision; `no` is float32."""
    folded: bool = False
    """Fold batch norms into convolutions first, as for deployment: `ds.fuse`, and for hosts torch.fx's `fuse`."""
    threads: int | None = None
    """Threads of the CPU; None is PyTorch's own number."""
    keep_heap: bool = True
    """Have the process keep the memory that it frees, where its allocator is glibc's, so that no chance decides."""
    rounds: int | None = None
    """How often each network has its turn."""
    output: Path | None = None
    """Folder for the figures, which must not exist; None makes one under runs/ named by the time."""

    def resolved(self, device: str) -> "BenchConfig":
        """The same with nothing left open but the batch size and the modes, which the networks decide.

        Raises:
            DenseShortcutError: numbers that cannot work.
        """
        own = dict(DEFAULTS["gpu" if self.gpu else device])
        if self.depths:
            own |= {"models": ("*",), "image_size": (SWEEP_SIZE[device],)}
        chosen = {key: value for key, value in own.items() if getattr(self, key) in (None, ())}
        found = dataclasses.replace(self, **chosen | {"device": device})
        _check(found)
        return found


def _check(config: BenchConfig) -> None:
    for field in ("batch_size", "image_size", "depths", "threads", "rounds"):
        given = getattr(config, field)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and value < 1:
                raise DenseShortcutError(f"--{field.replace('_', '-')} is {value}: it must be 1 or above.")
    if not config.depths and any(size < 32 for size in config.image_size):
        raise DenseShortcutError(f"--image-size {min(config.image_size)} is too small for these networks: take 32 up.")
    one_pixel = 1 if config.depths else 32  # the image size at which the last maps have one pixel
    if config.batch_size == 1 and "train" in config.what and one_pixel in config.image_size:
        raise DenseShortcutError(
            f"--batch-size 1 at --image-size {one_pixel} leaves a batch norm one pixel: take 2 images or more."
        )
    if config.folded and "train" in config.what:
        raise DenseShortcutError("--folded leaves networks that only infer: add --what infer.")

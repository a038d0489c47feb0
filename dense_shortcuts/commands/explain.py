"""`dsnet cam` and `dsnet shortcuts`: what a network looked at, and what it learned to look back at."""

from dataclasses import dataclass
from pathlib import Path

from .arguments import Positional


@dataclass(frozen=True)
class Cam:
    """Draw class activation maps of networks side by side, and score them where boxes are known."""

    images: Positional[tuple[Path, ...]]
    """Images, or folders of images."""
    models: str = "resnet50,dsnet50"
    """Networks, separated by commas: folders of trained networks (runs/NAME/stage-auto), shipped, timm's models."""
    method: str = "gradcam,gradcam++"
    """Methods, separated by commas, or all: gradcam, gradcam++, hirescam, elementwise, xgradcam, layercam, shapleycam,
    finercam, eigencam, eigengradcam, kpcacam, fem, scorecam, ablationcam, fullgrad, randomcam."""
    layer: str | None = None
    """Module whose output is looked at, such as layer3; None is the last stage by timm's feature_info."""
    target: str | None = None
    """Class, by name or number; None is the boxes' category where the networks know it, else the likeliest class."""
    boxes: Path | None = None
    """COCO file with boxes, matched to the images by file name: adds energy inside the boxes and the pointing game."""
    pretrained: bool = False
    """Load timm's trained weights, which may be downloaded; else models of timm start at random."""
    output: Path = Path("cam.png")
    """The picture; the numbers go beside it as .json."""
    draw: int = 8
    """So many images are drawn; all are scored."""

    def run(self, line: str) -> None:
        from ..experiments.explain.run import cam

        cam(**vars(self), line=line)


@dataclass(frozen=True)
class Shortcuts:
    """Draw what a network learned to look back at: mean |w| of every pair, its spread, and its change in training."""

    checkpoint: Positional[str]
    """A network's folder in a run, the model.safetensors in it, shipped, or a DSNet by name, which shows its start."""
    output: Path = Path("shortcuts.png")
    """The picture; the numbers go beside it as .json."""

    def run(self, line: str) -> None:
        from ..experiments.explain.shortcuts import shortcuts

        shortcuts(self.checkpoint, self.output, line)

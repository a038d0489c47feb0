"""torchvision's detectors over a feature pyramid on a timm backbone."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ...backbone import Backbone
from .config import DetectConfig

TWO_STAGE = ("fasterrcnn", "maskrcnn")
MOST = 100  # detections an image, as COCO counts them


class Pyramid(nn.Module):
    """A backbone and torchvision's feature pyramid over its maps, as torchvision's detectors take them.

    Attributes:
        out_channels: width of every level.
        strides: stride of each level that `forward` gives.
    """

    def __init__(self, body: Backbone, out_channels: int, *, two_stage: bool) -> None:
        super().__init__()
        extra = LastLevelMaxPool() if two_stage else LastLevelP6P7(out_channels, out_channels)
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(list(body.channels), out_channels, extra)
        more = 1 if two_stage else 2
        self.strides = (*body.reductions, *(body.reductions[-1] * 2**k for k in range(1, more + 1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (N, out_channels, H / s, W / s) by level name, the backbone's first, from images (N, 3, H, W)."""
        return self.fpn({str(level): maps for level, maps in enumerate(self.body(x))})


def build_detector(
    config: DetectConfig, num_classes: int, look: dict[str, Any] | None = None, *, load_weights: bool = True
) -> Any:
    """The detector that a configuration names; the seed decides its weights.

    Args:
        num_classes: classes without the background.
        look: mean and std that images are normalised with; None takes the backbone's own.
        load_weights: start the backbone from the weights that the configuration names.

    Raises:
        DenseShortcutError: what `Backbone` refuses.
    """
    torch.manual_seed(config.seed)
    body = build_backbone(config, load_weights)
    pyramid = Pyramid(body, config.fpn_channels, two_stage=config.detector in TWO_STAGE)
    look = look or look_of(body)
    settings = {
        "min_size": config.img_size,
        "max_size": config.max_size or math.ceil(max(config.img_size) * 5 / 3),
        "image_mean": list(look["mean"]),
        "image_std": list(look["std"]),
        "size_divisible": max(32, body.reductions[-1]),
    }
    classes = num_classes + 1  # class 0 is the background; the one-stage detectors have it too, and never see it
    model = BUILDERS[config.detector](pyramid, classes, settings)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if config.sync_bn else model
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def build_backbone(config: DetectConfig, load_weights: bool) -> Backbone:
    """The backbone of a configuration, plugged in unless it is to stay a host."""
    options = config.shared().options() if config.aggregate != "identity" else {"aggregate": "identity"}
    return Backbone(
        config.model,
        out_indices=config.out_indices or None,
        finest=4 if config.detector in TWO_STAGE else 8,
        frozen_stages=config.frozen_stages if load_weights else -1,
        norm_eval=config.norm_eval and load_weights,
        pretrained=config.pretrained and load_weights,
        weights=config.backbone_weights if load_weights else None,
        **options,
    )


def look_of(body: Backbone) -> dict[str, Any]:
    """Mean and std that the backbone's images are normalised with."""
    own: Any = body.features
    return {"mean": list(own.pretrained_cfg["mean"]), "std": list(own.pretrained_cfg["std"])}


def faster_rcnn(pyramid: Pyramid, classes: int, settings: dict[str, Any]) -> nn.Module:
    return detection.FasterRCNN(pyramid, **two_stage(pyramid, classes), **settings)


def mask_rcnn(pyramid: Pyramid, classes: int, settings: dict[str, Any]) -> nn.Module:
    width = pyramid.out_channels
    return detection.MaskRCNN(
        pyramid,
        **two_stage(pyramid, classes),
        mask_roi_pool=MultiScaleRoIAlign(level_names(pyramid), 14, 2),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
        **settings,
    )


def two_stage(pyramid: Pyramid, classes: int) -> dict[str, Any]:
    """Anchors and heads in torchvision's proportions: sizes of 8 strides, and a box head four times the pyramid."""
    width = pyramid.out_channels
    sizes = tuple((8 * stride,) for stride in pyramid.strides)
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(level_names(pyramid), 7, 2),
        "box_head": TwoMLPHead(width * 7 * 7, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, classes),
        "box_detections_per_img": MOST,
    }


def level_names(pyramid: Pyramid) -> list[str]:
    """The levels that regions are pooled from: all but the added one."""
    return [str(level) for level in range(len(pyramid.body.reductions))]


def retinanet(pyramid: Pyramid, classes: int, settings: dict[str, Any]) -> nn.Module:
    sizes = tuple(tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return detection.RetinaNet(pyramid, classes, anchor_generator=anchors, detections_per_img=MOST, **settings)


def fcos(pyramid: Pyramid, classes: int, settings: dict[str, Any]) -> nn.Module:
    sizes = tuple((stride,) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    # torchvision hides scores under 0.2, which cuts the end off the curve of precision over recall
    return detection.FCOS(
        pyramid, classes, anchor_generator=anchors, detections_per_img=MOST, score_thresh=0.05, **settings
    )


BUILDERS = {"fasterrcnn": faster_rcnn, "maskrcnn": mask_rcnn, "retinanet": retinanet, "fcos": fcos}

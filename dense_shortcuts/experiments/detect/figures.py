"""The twelve figures of COCO, by faster-coco-eval through torchmetrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...extras import need
from .data import Coco, Picture, has_mask, truth

# Name in files, torchmetrics' name, IoU, area and detections an image of each figure, in COCO's order.
TWELVE = (
    ("AP", "map", "0.50:0.95", "all", 100),
    ("AP50", "map_50", "0.50", "all", 100),
    ("AP75", "map_75", "0.75", "all", 100),
    ("APs", "map_small", "0.50:0.95", "small", 100),
    ("APm", "map_medium", "0.50:0.95", "medium", 100),
    ("APl", "map_large", "0.50:0.95", "large", 100),
    ("AR1", "mar_1", "0.50:0.95", "all", 1),
    ("AR10", "mar_10", "0.50:0.95", "all", 10),
    ("AR100", "mar_100", "0.50:0.95", "all", 100),
    ("ARs", "mar_small", "0.50:0.95", "small", 100),
    ("ARm", "mar_medium", "0.50:0.95", "medium", 100),
    ("ARl", "mar_large", "0.50:0.95", "large", 100),
)


class Meter:
    """Gathers detections with what is true, image by image, and gives the figures.

    Args:
        kind: "bbox" or "segm".
        by_class: AP of each class as well.
    """

    def __init__(self, kind: str = "bbox", *, by_class: bool = False) -> None:
        need("scoring detections", "detect")
        from torchmetrics.detection import MeanAveragePrecision

        # One kind a metric: with both, torchmetrics would put its own areas in place of the file's.
        self.metric: MeanAveragePrecision = MeanAveragePrecision(
            box_format="xywh",
            iou_type=kind,
            class_metrics=by_class,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        self.metric.warn_on_many_detections = False
        self.kind, self.by_class = kind, by_class

    def add(self, picture: Picture, found: Mapping[str, Tensor] | None) -> None:
        """Add an image.

        Args:
            found: boxes (n, 4) as x1 y1 x2 y2, scores, labels and, for masks, masks (n, H, W) of zeros and ones; None
                for an image that could not be looked at.
        """
        if found is None:
            target = unseen(picture, masks=self.kind == "segm")
            found = {key: value[:0] for key, value in target.items()} | {"scores": torch.zeros(0)}
        else:
            size = (found["masks"].shape[-2], found["masks"].shape[-1]) if self.kind == "segm" else None
            target = truth(picture, size)
            found = {key: value.detach().cpu() for key, value in found.items()}
            boxes = found["boxes"].double()
            found["boxes"] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        if self.kind == "segm" and not len(target["labels"]):
            target = stand_in(target)
        self.metric.update([found], [target])

    def states(self) -> dict[str, list[Any]]:
        """What was gathered, to be sent to another process."""
        return {name: list(values) for name, values in self.metric.metric_state.items()}

    def extend(self, states: Mapping[str, Sequence[Any]]) -> None:
        """Add what another process gathered."""
        for name, values in states.items():
            getattr(self.metric, name).extend(values)

    def figures(self, coco: Coco) -> dict[str, Any]:
        """The twelve figures by name, from 0 to 1, -1 where no annotation is of that kind; by_class adds "classes"."""
        computed = self.metric.compute()
        found: dict[str, Any] = {name: float(computed[theirs]) for name, theirs, *_ in TWELVE}
        if self.by_class:
            labels = computed["classes"].reshape(-1).tolist()
            aps = dict(zip(labels, computed["map_per_class"].reshape(-1).tolist(), strict=True))
            found["classes"] = {name: aps.get(label, -1.0) for label, name in enumerate(coco.names, 1)}
        return found


def unseen(picture: Picture, *, masks: bool) -> dict[str, Tensor]:
    """`truth` of an image whose file is missing. Nothing is found there, so empty masks do as well as its own."""
    if not masks:
        return truth(picture)
    target = truth(dataclasses.replace(picture, boxes=tuple(filter(has_mask, picture.boxes))))
    return target | {"masks": torch.zeros(len(target["labels"]), 1, 1, dtype=torch.uint8)}


def stand_in(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """An empty crowd for an image without masks. It can match nothing and counts nowhere; without it torchmetrics
    leaves the image out, and what is wrongly found there with it."""
    return {
        "boxes": torch.zeros(1, 4, dtype=torch.float64),
        "labels": torch.ones(1, dtype=torch.int64),
        "iscrowd": torch.ones(1, dtype=torch.int64),
        "area": torch.zeros(1, dtype=torch.float64),
        "masks": torch.zeros(1, *target["masks"].shape[1:], dtype=torch.uint8),
    }


def twelve_lines(figures: Mapping[str, float]) -> list[str]:
    """The figures as pycocotools prints them."""
    lines = []
    for name, _, iou, area, most in TWELVE:
        title, short = ("Average Precision", "(AP)") if name.startswith("AP") else ("Average Recall", "(AR)")
        lines.append(
            f" {title:<18} {short} @[ IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d} ] = {figures[name]:0.3f}"
        )
    return lines

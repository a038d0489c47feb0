"""The optional library that scores detections and draws masks, faster-coco-eval, asked for when it is needed."""

from typing import Any

from ...errors import DenseShortcutError


def mask_tools() -> Any:
    """COCO's mask functions (encode, decode, merge, frPyObjects).

    Raises:
        DenseShortcutError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise DenseShortcutError(
            "scores and masks need faster-coco-eval, which is not installed: pip install 'dense-shortcuts[detect]'."
        ) from error
    return mask

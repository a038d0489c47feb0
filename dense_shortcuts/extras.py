"""Optional libraries: which extra of the package installs each, and the one sentence where one is missing."""

from importlib.util import find_spec

from .errors import DenseShortcutError

# By extra, as in pyproject.toml: the module that is imported and the package that brings it.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {
        "accelerate": "accelerate",
        "torchmetrics": "torchmetrics",
        "rich": "rich",
        "sklearn": "scikit-learn",
        "scipy": "scipy",
        "matplotlib": "matplotlib",
        "pyarrow": "pyarrow",
        "psutil": "psutil",
    },
    "sweep": {"optuna": "optuna", "sqlalchemy": "sqlalchemy"},
    "data": {"webdataset": "webdataset", "braceexpand": "webdataset", "datasets": "datasets"},
    "track": {"tensorboard": "tensorboard"},
    "wandb": {"wandb": "wandb"},
    "trackio": {"trackio": "trackio"},
    "detect": {"faster_coco_eval": "faster-coco-eval"},
    "explain": {"pytorch_grad_cam": "grad-cam"},
    "demo": {"gradio": "gradio", "pytorch_grad_cam": "grad-cam"},
    "export": {
        "onnx": "onnx",
        "onnxscript": "onnxscript",
        "onnxruntime": "onnxruntime",
        "openvino": "openvino",
        "torchao": "torchao",
    },
    "executorch": {"executorch": "executorch"},
}


def is_installed(module: str) -> bool:
    """Whether a module could be imported; it is not imported for that."""
    try:
        return find_spec(module) is not None
    except ImportError:  # of an import hook that blocks it
        return False


def need(feature: str, extra: str, *modules: str) -> None:
    """Refuse to go on where a library is missing.

    Args:
        feature: what cannot be done without it.
        extra: what installs it.
        modules: those of the extra's that are needed; none given means all.

    Raises:
        DenseShortcutError: one of them is not installed.
    """
    for module in modules or EXTRAS[extra]:
        if not is_installed(module):
            raise DenseShortcutError(
                f"{feature} needs {EXTRAS[extra][module]}: pip install 'dense-shortcuts[{extra}]'."
            )

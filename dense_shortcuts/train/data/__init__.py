"""Images for training: their sources, one a file, and the loaders of their batches."""

from .images import Arrays, BrokenImage, Files
from .loading import Data, epochs_of, load_data, make_loader, worker_error
from .stream import Stream
from .transformed import EpochSampler, TransformedImages, mixed_seed

__all__ = [
    "Arrays",
    "BrokenImage",
    "Data",
    "EpochSampler",
    "Files",
    "Stream",
    "TransformedImages",
    "epochs_of",
    "load_data",
    "make_loader",
    "mixed_seed",
    "worker_error",
]

"""Images for training: their sources, one a file, and the loaders of their batches."""

from .images import Arrays, BrokenImage, Files
from .loading import Data, batches, epochs_of, load_data, make_loader
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
    "batches",
    "epochs_of",
    "load_data",
    "make_loader",
    "mixed_seed",
]

"""scikit-learn's handwritten digits, which need no download."""

import numpy as np

from ..config import TrainConfig
from .images import Arrays


def load_digits(config: TrainConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 8x8 pixels of 17 grey levels; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    grey = (images.reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8)
    pixels = grey.repeat(3, axis=3)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = Arrays(parts[0], parts[2]), Arrays(parts[1], parts[3])
    return train.head(config.limit_train), test.head(config.limit_test), tuple(str(d) for d in range(10))

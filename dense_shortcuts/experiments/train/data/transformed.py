"""Images after their transform, in an order and with an augmentation that follow from the seed alone."""

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ....errors import DenseShortcutError
from ..config import TrainConfig
from .broken import BrokenImages, readable
from .images import Images

Channels = tuple[float, ...]


class TransformedImages(Dataset):
    """Images after their transform. An index is (epoch, place): augmentation follows from it and the seed alone.

    So the same images come with any number of worker processes, and a resumed run needs no saved random state. A third
    number in the index tells the copies of an image in one epoch apart.

    A broken image is kept in `broken`. In training the next readable one stands in for it; in a test a black one does,
    with the label of the broken one, for what is tested must stay the same.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int,
        broken: BrokenImages,
        *,
        training: bool,
    ) -> None:
        self.images, self.transform, self.seed, self.broken, self.training = images, transform, seed, broken, training

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        image, label = readable(self.images, index[1], self.broken, training=self.training)
        with seeded(self.seed, *index):
            return self.transform(image), label


class EpochSampler(Sampler[tuple[int, ...]]):
    """(epoch, place) pairs: shuffled by (seed, epoch) alone, or in order. Set `epoch` before each pass.

    Args:
        repeats: copies of each image that follow each other, told apart by a third number; an epoch keeps its length,
            so it has fewer of the images (repeated augmentation, in the order of timm's RepeatAugSampler).
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int, repeats: int = 1) -> None:
        self.length, self.shuffle, self.seed, self.repeats = length, shuffle, seed, repeats
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length) if self.shuffle else None
        places = (int(i) for i in (order if order is not None else range(self.length)))
        if self.repeats == 1:
            return ((self.epoch, place) for place in places)
        copies = ((self.epoch, place, copy) for place in places for copy in range(self.repeats))
        return (index for index, _ in zip(copies, range(self.length), strict=False))


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, without the likeness that their sum would have."""
    return zlib.crc32(repr(numbers).encode())


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and PyTorch's CPU generator follow from `numbers` inside.

    PyTorch's go on as before afterwards, for drop path draws from them between two images. NumPy's and Python's do not:
    keeping their states takes longer than a small image's whole transform, and mixup seeds itself.
    """
    seed = mixed_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerator's generator too
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def train_transform(config: TrainConfig, mean: Channels, std: Channels) -> Callable[..., torch.Tensor]:
    """timm's training transform; with `crop_padding` a crop from the padded image stands in for the resized crop.

    Raises:
        DenseShortcutError: an augmentation policy that timm does not know.
    """
    from timm.data import create_transform
    from torchvision import transforms

    assert config.img_size is not None and config.interpolation is not None
    look = {"mean": mean, "std": std, "interpolation": config.interpolation}
    # Colour jitter is left out by None; by 0 it would be run and change nothing.
    settings = look | {"hflip": 0.5 if config.flip else 0.0, "auto_augment": config.auto_augment, "color_jitter": None}
    try:
        transform = create_transform(config.img_size, is_training=True, **settings)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise DenseShortcutError(
            f"--auto-augment {config.auto_augment!r} does not work ({error}): take one such as rand-m9-mstd0.5."
        ) from error
    if config.crop_padding is not None:  # as DeiT does for CIFAR
        crop = transforms.RandomCrop(config.img_size, config.crop_padding)
        transform.transforms[:1] = [resize(config), crop]
    return transform


def resize(config: TrainConfig) -> Callable[[Image.Image], Image.Image]:
    """Resizes the shorter side to the training size."""
    from torchvision import transforms

    return transforms.Resize(config.img_size, transforms.InterpolationMode(config.interpolation))


def eval_transform(config: TrainConfig, mean: Channels, std: Channels) -> Callable[..., torch.Tensor]:
    """timm's test transform: resized so that the crop in the middle is `crop_pct` of the side."""
    from timm.data import create_transform

    size = config.test_size or config.img_size
    assert size is not None and config.crop_pct is not None and config.interpolation is not None
    return create_transform(size, crop_pct=config.crop_pct, mean=mean, std=std, interpolation=config.interpolation)

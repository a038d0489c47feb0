"""The data set that a configuration asks for, and the loaders of its batches."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ....errors import DenseShortcutError
from ....extras import need
from ..config import STREAMS, TrainConfig
from .broken import BrokenImages
from .cifar import load_cifar
from .device import DeviceImages, free_memory
from .digits import load_digits
from .fashion import load_fashion
from .folders import load_folder, load_tiny_imagenet
from .images import Kept, chosen_classes, of_classes, sample
from .parquet import load_parquet
from .stream import Stream, StreamShare
from .transformed import EpochSampler, TransformedImages, eval_transform, resize, train_transform


@dataclass(frozen=True)
class Data:
    """A data set ready for training.

    Attributes:
        train, test: items are (image (3, S, S) as float32, label); `train` is a Stream where it comes in passing.
        classes: names of the classes, the label being the place in it.
        mean, std, interpolation: what images are normalised and resized with.
    """

    train: TransformedImages | DeviceImages | Stream
    test: TransformedImages | DeviceImages
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


# Sets of small images that are all of one size, which a device can hold.
SMALL: dict[str, Callable[[TrainConfig], tuple[Kept, Kept, tuple[str, ...]]]] = {
    "fashion": load_fashion,
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "tiny-imagenet": load_tiny_imagenet,
}
LARGE: dict[str, Callable[[TrainConfig], tuple[Kept, Kept, tuple[str, ...]]]] = {
    "imagefolder": load_folder,
    "parquet": load_parquet,
}


def load_data(config: TrainConfig) -> Data:
    """The data set that a resolved configuration asks for.

    Raises:
        DenseShortcutError: missing or empty folder, unreadable file or image, missing column, label out of range.
    """
    need("reading images", "train")
    mean, std = channels(config)
    assert config.interpolation is not None
    transforms = train_transform(config, mean, std), eval_transform(config, mean, std)
    about = (mean, std, config.interpolation)
    if config.data in STREAMS:
        device_loader(config, None)
        return streamed(config, transforms, about)
    train, test, classes = read_images(config)
    broken = broken_images(config, len(train)), broken_images(config, len(test), "test images")
    device = device_loader(config, len(train) + len(test))
    if device is not None:
        how: dict[str, Any] = {"mean": mean, "std": std, "seed": config.seed, "device": device}
        augmented: dict[str, Any] = {"padding": config.crop_padding, "flip": bool(config.flip)}
        kept = DeviceImages(train, resize(config), broken=broken[0], **augmented, **how)
        return Data(kept, DeviceImages(test, pictures(transforms[1]), broken=broken[1], **how), classes, *about)
    return Data(
        TransformedImages(train, transforms[0], config.seed, broken[0], training=True),
        TransformedImages(test, transforms[1], config.seed, broken[1], training=False),
        classes,
        *about,
    )


def read_images(config: TrainConfig) -> tuple[Kept, Kept, tuple[str, ...]]:
    """Training images, test images and the names of the classes, of all or of the chosen ones.

    Raises:
        DenseShortcutError: as `load_data`; no such classes, or no image of them.
    """
    train, test, classes = read_parts(config)
    if config.validation is None:
        return train, test, classes
    if config.validation >= len(train):
        raise DenseShortcutError(
            f"--validation {config.validation} leaves nothing of {len(train):,} training images: take fewer."
        )
    held_out, labels = sample(config.validation, len(train)), np.asarray(train.labels)
    rest = np.delete(np.arange(len(train)), held_out)
    return train.take(rest, labels[rest]), train.take(held_out, labels[held_out]), classes


def read_parts(config: TrainConfig) -> tuple[Kept, Kept, tuple[str, ...]]:
    """`read_images` without a validation part."""
    read = (SMALL | LARGE)[config.data]
    if config.classes is None:
        return read(config)
    train, test, names = read(dataclasses.replace(config, limit_train=None, limit_test=None))
    numbers = chosen_classes(config, len(names))
    train, test = of_classes(train, numbers, config.limit_train), of_classes(test, numbers, config.limit_test)
    if not len(train) or not len(test):
        missing = "test" if len(train) else "training"
        raise DenseShortcutError(f"{config.data} has no {missing} image of --classes {config.classes!r}: take others.")
    return train, test, tuple(names[number] for number in numbers)


def channels(config: TrainConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of the set or of ImageNet."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ....models.dsnet import CIFAR_MEAN, CIFAR_STD

    if config.data == "fashion":
        return (0.287,) * 3, (0.354,) * 3  # of the 28x28 training images
    if config.data == "digits":
        return (0.305,) * 3, (0.376,) * 3  # of the 8x8 training images
    if config.data in ("cifar10", "cifar100"):
        return CIFAR_MEAN, CIFAR_STD
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def streamed(config: TrainConfig, transforms: tuple[Any, Any], about: tuple[Any, ...]) -> Data:
    """Training images as a stream, test images read when asked for."""
    from .hub import load_stream
    from .shards import load_shards

    load = load_stream if config.data == "streaming" else load_shards
    source, length, test, classes = load(config)
    broken = broken_images(config, length), broken_images(config, len(test), "test images")
    train = Stream(source, length, len(classes), transforms[0], config.seed, broken[0])
    tested = TransformedImages(test, transforms[1], config.seed, broken[1], training=False)
    return Data(train, tested, classes, *about)


def broken_images(config: TrainConfig, images: int, what: str = "training images") -> BrokenImages:
    return BrokenImages(config.max_broken, images, what)


def device_loader(config: TrainConfig, images: int | None) -> torch.device | None:
    """The device that is to hold so many images, None where worker processes prepare them.

    Raises:
        DenseShortcutError: `--loader device` with another data set or augmentation, or too little memory.
    """
    from ..processes import make_accelerator

    if config.loader == "workers":
        return None
    assert config.img_size is not None
    device = make_accelerator(config).device  # who asks Accelerate first decides whether it knows the processes
    side = max(config.img_size + 2 * (config.crop_padding or 0), config.test_size or 0)
    refused = None
    if images is None or config.data not in SMALL:
        refused = f"does not hold --data {config.data}, only {', '.join(SMALL)}"
    elif config.auto_augment is not None:
        refused = "knows crops and flips, not --auto-augment"
    elif 2 * images * side * side * 3 > free_memory(device):
        refused = f"needs twice the {images * side * side * 3 / 2**30:.1f} GiB of the images free on {device}"
    if refused is not None and config.loader == "device":
        raise DenseShortcutError(f"--loader device {refused}: take --loader workers.")
    return device if refused is None else None


def pictures(transform: Any) -> Callable[..., Any]:
    """A test transform without its last two steps, which make a tensor and normalise it."""
    from torchvision import transforms

    return transforms.Compose(transform.transforms[:-2])


def make_loader(images: Any, config: TrainConfig, *, training: bool = False) -> DataLoader:
    """Batches of (images, labels). Training leaves out the last batch where it is smaller than the others.

    Raises:
        DenseShortcutError: fewer training images than one batch holds, fewer shards than processes.
    """
    if training and len(images) < config.batch_size:
        raise DenseShortcutError(
            f"{len(images)} training images are fewer than one batch: take --batch-size {len(images)} or less."
        )
    if isinstance(images, Stream):
        return stream_loader(images, config)
    on_device = isinstance(images, DeviceImages)
    workers = 0 if on_device else config.workers or 0
    return DataLoader(
        images,
        batch_size=config.batch_size // config.accumulate,
        sampler=EpochSampler(
            len(images), shuffle=training, seed=config.seed, repeats=config.aug_repeats if training else 1
        ),
        drop_last=training,
        num_workers=workers,
        persistent_workers=bool(workers),
        pin_memory=torch.cuda.is_available() and not on_device,
        collate_fn=whole_batch if on_device else None,
        generator=torch.Generator(),  # else the seeds of worker processes come from the generator of drop path
    )


def whole_batch(batch: Any) -> Any:
    """A batch that came as one."""
    return batch


def stream_loader(stream: Stream, config: TrainConfig) -> DataLoader:
    """A process's share of a stream, on its device. Accelerate takes it as it is: others would read it for all."""
    from accelerate.data_loader import DataLoaderShard

    from ..processes import make_accelerator

    state = make_accelerator(config)
    readers = stream.source.readers(state.num_processes)
    if not readers:
        raise DenseShortcutError(
            f"the training files are fewer than the {state.num_processes} processes: cut them into more shards."
        )
    workers = min(config.workers or 0, readers)
    size = config.batch_size // config.accumulate // state.num_processes
    batches = len(stream) // config.batch_size * config.accumulate
    share = StreamShare(stream, state.process_index, state.num_processes, batches, size)
    loader = DataLoaderShard(
        share,
        device=state.device,
        batch_size=size,
        num_workers=workers,
        persistent_workers=bool(workers),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    loader._is_accelerate_prepared = True
    return loader


def epochs_of(loader: DataLoader) -> EpochSampler | StreamShare:
    """What to set `epoch` of before each pass over a training loader that Accelerate has not wrapped yet."""
    source: Any = loader.dataset if isinstance(loader.dataset, StreamShare) else loader.sampler
    return source


def batches(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; an error in one of its processes, which wrap it in a traceback, is raised as it was."""
    try:
        yield from loader
    except DenseShortcutError as error:
        raise DenseShortcutError(str(error).rstrip().rsplit("DenseShortcutError: ", 1)[-1]) from error

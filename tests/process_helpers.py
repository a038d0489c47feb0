"""Several processes on one machine: forked from the tests' own, so that nothing is imported a second time."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import timm.models
from accelerate.state import AcceleratorState
from rich.console import Console
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.display import Display
from dense_shortcuts.experiments.train.loop import METRICS, read_metrics, train_network
from dense_shortcuts.experiments.train.network import network_label
from dense_shortcuts.models.cifar import cifar_resnet

SECONDS = 1200  # after which a process that hangs is ended, and the test fails


def tiny_resnet(num_classes: int, **kwargs) -> ResNet:
    return cifar_resnet(block=BasicBlock, layers=(2, 1, 1), channels=(8, 8, 16), num_classes=num_classes, **kwargs)


@timm.models.register_model
def resnet_tiny(num_classes, **from_timm) -> ResNet:
    return tiny_resnet(num_classes)


@timm.models.register_model
def resnet_tiny_gn(num_classes, **from_timm) -> ResNet:
    """Group norm throughout: no statistics cross the images, so that a batch may be cut anywhere."""
    return tiny_resnet(num_classes, norm_layer=GroupNorm)


class GroupNorm(nn.GroupNorm):
    """Four groups, made from a number of channels as timm makes norms."""

    def __init__(self, channels: int, **kwargs) -> None:
        super().__init__(4, channels, **kwargs)


def tiny(**changes) -> TrainConfig:
    """64 digits of 8x8, two epochs of two steps, in 50 test images the last batch is ragged."""
    settings = {
        "model": "resnet_tiny",
        "norm": "group",
        "img_size": 8,
        "crop_padding": 1,
        "limit_train": 64,
        "limit_test": 50,
        "batch_size": 32,
        "epochs": 2,
        "warmup_epochs": 0,
        "lr": 0.05,
        "timeout": 300,
    }
    return TrainConfig(**settings | changes)


def fit(config: TrainConfig, folder: Path) -> list[dict]:
    """Trains one network in a folder and gives its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config.resolved()
    train_network(
        config, load_data(config), folder, Display([network_label(config)], config.epochs, Console(quiet=True))
    )
    return read_metrics(folder / METRICS)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


class Group:
    """Processes that run `work(rank)`; what one prints goes to its own file in `folder`."""

    def __init__(self, count: int, work: Callable[[int], object], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output-{rank}" for rank in range(count)]
        for output in self.outputs:
            output.touch()
        port, fork = free_port(), multiprocessing.get_context("fork")
        self.processes = [
            fork.Process(target=_member, args=(rank, count, port, work, self.outputs[rank])) for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        """Waits for the end of all and gives their exit codes, negative for a signal."""
        for process in self.processes:
            process.join(SECONDS)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text()

    def succeed(self) -> None:
        assert self.codes() == [0] * len(self.processes), "\n".join(map(self.said, range(len(self.processes))))


def _member(rank: int, count: int, port: str, work: Callable[[int], object], output: Path) -> None:
    with output.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        if count > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in places.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.freeze()  # what the tests have in memory is no child's to look through
        try:
            code = work(rank)
        except BaseException:
            traceback.print_exc()
            code = 1
        file.flush()
    os._exit(int(code or 0))  # pytest's own endings are not for a child

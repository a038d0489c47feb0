"""What a network costs: parameters, multiply-adds, memory of a training step, images a second."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...ops import flops
from ..profiling import peak_bytes
from .config import TrainConfig
from .loop import memory_format, placed
from .network import build_network, make_loss, make_optimizer
from .processes import make_accelerator


def parameters(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def multiply_adds(model: nn.Module, img_size: int) -> int:
    """Multiply-adds for one image: convolutions and linear layers, and one for each number of each weighted map."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with FlopCounterMode(display=False, custom_mapping=flops.PLAIN) as counter:
            model(torch.zeros(1, 3, img_size, img_size, device=device))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def images_at_once(config: TrainConfig) -> int:
    """Images that a process has in memory in a training step."""
    return config.batch_size // (make_accelerator(config).num_processes * config.accumulate)


def training_step_memory(config: TrainConfig, num_classes: int) -> int:
    """Bytes held at the highest point of one training step (`peak_bytes`), after one before it."""
    step, resident, device = training_step(config, num_classes)
    step()
    return peak_bytes(step, resident(), device)


def training_step(
    config: TrainConfig, num_classes: int
) -> tuple[Callable[[], None], Callable[[], list[Tensor]], torch.device]:
    """One training step on noise, ready to be called; what is in memory between two calls; and the device."""
    device = make_accelerator(config).device
    batch_size = images_at_once(config)
    model = placed(build_network(config, num_classes), config, device).train()
    optimizer = make_optimizer(config, model)
    images = torch.randn(batch_size, 3, config.img_size or 32, config.img_size or 32, device=device)
    images = images.contiguous(memory_format=memory_format(config))
    labels = torch.arange(batch_size, device=device) % num_classes
    loss, mix = make_loss(config, num_classes)
    autocast = make_accelerator(config).autocast
    network: Any = torch.compile(model) if config.compile else model

    def step() -> None:
        batch, target = mix(images.clone(), labels) if mix is not None else (images, labels)
        with autocast():
            output = network(batch)
        loss(output.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    def resident() -> list[Tensor]:
        state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return [*model.parameters(), *model.buffers(), *state, images, labels]

    return step, resident, device


@torch.no_grad()
def inference_speed(models: Sequence[nn.Module], config: TrainConfig, *, rounds: int = 5) -> list[float]:
    """Images a second of each network in turn, medians of interleaved rounds, so that a busy machine hits all alike."""
    accelerator = make_accelerator(config)
    device = accelerator.device
    size = config.img_size or 32
    images = torch.randn(config.batch_size, 3, size, size, device=device)
    images = images.contiguous(memory_format=memory_format(config))
    networks: list[Any] = [placed(m, config, device).eval() for m in models]
    networks = [torch.compile(m) for m in networks] if config.compile else networks
    speeds: list[list[float]] = [[] for _ in networks]
    for warm in range(rounds + 1):
        for network, seen in zip(networks, speeds, strict=True):
            with accelerator.autocast():
                seconds = _seconds(lambda network=network: network(images), device)
            if warm:
                seen.append(config.batch_size / seconds)
    return [statistics.median(seen) for seen in speeds]


def _seconds(call: Any, device: torch.device, *, least: float = 0.1) -> float:
    """Seconds of one call, from as many as fill `least` seconds."""
    calls, started = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - started
        if elapsed >= least:
            return elapsed / calls

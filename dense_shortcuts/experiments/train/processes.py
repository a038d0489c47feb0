"""Many processes: how a network is spread over them, and how the loss of one of them is told."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ...errors import DenseShortcutError
from ...extras import need
from ...nn.affine_form import affine_form
from ...nn.stage import DenseStage
from ...surgery.plug import shortcut_norms
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainConfig) -> "Accelerator":
    """Accelerate's view of device, precision and processes.

    Raises:
        DenseShortcutError: a missing library, a device that cannot do this precision, or a batch that does not divide
            among the processes.
    """
    need("training", "train")
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs

    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # unasked, it would leave processes on CPUs unaware of each other
            mixed_precision=config.precision,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.timeout))],
        )
    except ValueError as error:
        raise DenseShortcutError(f"--precision {config.precision} does not work here: {error}") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise DenseShortcutError("--precision fp16 needs a GPU, for a CPU has no loss scaling: take bf16 or no.")
    parts = accelerator.num_processes * config.accumulate
    each = (
        f"--batch-size {config.batch_size} over {accelerator.num_processes} processes, --accumulate {config.accumulate}"
    )
    if config.batch_size % parts:
        raise DenseShortcutError(f"{each}, does not divide into whole images: take a multiple of {parts}.")
    if (config.mixup or config.cutmix) and config.batch_size // parts % 2:
        raise DenseShortcutError(
            f"{each}, is an odd number of images at a time: mixup and cutmix need a multiple of {2 * parts}."
        )
    return accelerator


def is_split(config: TrainConfig, accelerator: "Accelerator") -> bool:
    """Whether each process holds a part of the weights only; a single process holds them all."""
    return config.strategy == "fsdp" and accelerator.num_processes > 1


def shard(model: nn.Module, device: torch.device, *, stages: bool) -> None:
    """Split a network's weights over the processes, in place (FSDP2): one unit a stage, and one for the rest.

    A unit gathers its weights when it is called and lets them go afterwards. Blocks of a dense stage are run by their
    stage, which reads the shortcut's weights between them, so the stage is what must be whole.

    Args:
        stages: False makes the network one unit; so it must be where stages are not called but taken apart, as
            gradient checkpointing does.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in units(model) if stages else []:
        fully_shard(unit, mesh=mesh)
    # Else the last unit would stay whole after a test, and the state would be that of no shard.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def units(model: nn.Module) -> list[nn.Module]:
    """The stages of a network: dense ones, else the plain sequences that it is made of."""
    dense: list[nn.Module] = [m for m in model.modules() if isinstance(m, DenseStage) and m is not model]
    return dense or [child for child in model.children() if type(child) is nn.Sequential]


class SyncBatchNormOnCPU(nn.SyncBatchNorm):
    """PyTorch's synchronised batch norm, which itself runs on GPUs only, from the shortcuts' own arithmetic."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        mean, variance = input.mean((2, 3)), input.var((2, 3), correction=0)
        scale, shift = affine_form(self, mean, variance, input)
        assert shift is not None
        return input * scale[:, :, None, None].to(input.dtype) + shift[:, :, None, None].to(input.dtype)


def synchronise_on_cpu(model: nn.Module) -> None:
    """Turn the batch norms of a network, of host and shortcuts, into ones over all processes' images, in place.

    To be called once the network is wrapped, for DDP refuses PyTorch's class on a CPU.

    Raises:
        DenseShortcutError: a kind of batch norm that can be synchronised on a GPU only.
    """
    # A shortcut's norms are never called, so that theirs may stay the class that the operator knows.
    own = set(shortcut_norms(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if type(module) is not nn.BatchNorm2d:
            kind = type(module).__name__
            raise DenseShortcutError(f"--sync-bn: {name} is a {kind}, which needs a GPU: leave --sync-bn out.")
        module.__class__ = nn.SyncBatchNorm if module in own else SyncBatchNormOnCPU  # type: ignore[assignment]
        module.process_group = None  # type: ignore[assignment]


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics, which batch norms keep each by its own images."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    joined = torch.cat([buffer.double().flatten() for buffer in buffers])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for buffer, mean in zip(buffers, joined.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def gradients_stay(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """A backward pass within, unless it is the step's last, leaves its gradients in the process.

    Gradients of a split network (FSDP) are always shared out at once: holding them whole would cost what it saves.
    """
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def repeatable(config: TrainConfig) -> Iterator[None]:
    """With `deterministic`, PyTorch refuses or replaces operations whose bits differ from run to run."""
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextlib.contextmanager
def told_when_lost(accelerator: "Accelerator") -> Iterator[None]:
    """Turn the error of a process whose peers have gone, or wait in vain, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = lost_contact(error)
        if accelerator.num_processes == 1 or reason is None:
            raise
        raise DenseShortcutError(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost contact with another one "
            f"({reason}): see what that one said last, then start the processes again with --resume."
        ) from error


def lost_contact(error: RuntimeError) -> str | None:
    """What a communication error says, in a few words; None for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text and "NCCL" not in text:
        return None
    known = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "Broken pipe")
    return next((words.lower() for words in known if words in text), text.splitlines()[0])

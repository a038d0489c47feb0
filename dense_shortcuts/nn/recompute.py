"""Forward passes that are run a second time, by a backward pass, as activation checkpointing does."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch._C import _current_graph_task_id
from torch.compiler import is_compiling


def is_recomputing() -> bool:
    """Whether this forward pass is run by a backward pass, as activation checkpointing does."""
    return not is_compiling() and _current_graph_task_id() != -1


@contextlib.contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Batch norms in these modules normalise as ever but leave their running statistics and counters as they are.

    A forward pass that is run a second time to recompute activations would otherwise count its batch twice.
    """
    norms = [
        norm
        for module in modules
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and norm.track_running_stats
    ]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, counter in kept:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if counter is None else counter.clone()
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum, norm.num_batches_tracked = momentum, counter

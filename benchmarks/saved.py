"""What a training step keeps for its backward pass: bytes that autograd saves in a plugged network over its host's.

python benchmarks/saved.py --image-size 224
"""

import argparse
from typing import Any

import timm
import torch
from torch import Tensor, nn

import dense_shortcuts as ds


def saved_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass in training mode saves, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # held, so that no other takes its place
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network.train()(images)
    return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "resnet152", "resnetv2_50"])
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    images = torch.randn(2, 3, arguments.image_size, arguments.image_size)
    for name in arguments.models:
        host = saved_bytes(timm.create_model(name), images)
        for norm in ("group", "batch"):
            ratio = saved_bytes(ds.plug_in(timm.create_model(name), norm=norm), images) / host
            print(f"{name}, {norm} norm: {ratio:.4f} of the host's {host / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

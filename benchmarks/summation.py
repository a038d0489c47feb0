"""Time and memory of a DenseNet's training step as concatenation and as summation (dense_shortcuts.summation).

python benchmarks/summation.py [--batch-size 8] [--image-size 64] [--rounds 5] [--threads 2]

Networks take turns on the same random images; a ratio is taken within a round, and the table shows the median of the
rounds' ratios with the least and the greatest. Memory is the highest point of one training step, weights and gradients
included (dense_shortcuts.experiments.profiling.peak_bytes).
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dense_shortcuts.experiments.profiling import peak_bytes
from dense_shortcuts.summation import split


def networks() -> dict[str, nn.Module]:
    """torchvision's DenseNet-121 and its summation, each keeping and recomputing; the peer of the ratios is first."""
    made = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        host = torchvision.models.densenet121(memory_efficient=recompute)
        kept = "recomputed" if recompute else "kept"
        made[f"torchvision, memory_efficient={recompute}"] = host
        made[f"summation, normalised maps {kept}"] = split(host)
    return {name: net.to(memory_format=torch.channels_last).train() for name, net in made.items()}


def step(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(net(images), labels).backward()
    net.zero_grad(set_to_none=True)


def seconds(call: partial[None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch-size", 8), ("image-size", 64), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = torch.randn(given.batch_size, 3, given.image_size, given.image_size)
    images, labels = images.contiguous(memory_format=torch.channels_last), torch.arange(given.batch_size) % 1000

    nets = networks()
    steps = {name: partial(step, net, images, labels) for name, net in nets.items()}
    peaks = {}
    for name, net in nets.items():
        steps[name]()
        peaks[name] = peak_bytes(steps[name], [*net.parameters(), *net.buffers(), images, labels], images.device)
    rounds = [{name: seconds(call) for name, call in steps.items()} for _ in range(given.rounds)]

    peer = next(iter(nets))
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {given.threads} threads, float32")
    print(f"DenseNet-121, training step, input {tuple(images.shape)}, channels_last, {given.rounds} rounds\n")
    print("| network | step, ms | time | rounds | memory, MiB | memory |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in nets:
        ratios = [each[name] / each[peer] for each in rounds]
        milliseconds = statistics.median(each[name] for each in rounds) * 1e3
        print(
            f"| {name} | {milliseconds:.0f} | {statistics.median(ratios):.2f}x | {min(ratios):.2f}-{max(ratios):.2f} "
            f"| {peaks[name] / 2**20:.0f} | {peaks[name] / peaks[peer]:.2f}x |"
        )


if __name__ == "__main__":
    main()

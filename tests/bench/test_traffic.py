"""Bytes of the shortcuts: the least against a count by hand, and what is moved against operators run one by one."""

import pytest
import torch
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts.experiments.bench.models import SWEEP_WIDTH, bare_stage
from dense_shortcuts.experiments.bench.public_form import PublicStage
from dense_shortcuts.experiments.bench.traffic import best_tile, host_traffic, least_traffic, operators, shortcut_bytes

N, SIDE = 2, 16
LITTLE_MORE = 1.7
MAP_BYTES = 8 * N * SWEEP_WIDTH * SIDE * SIDE  # float64


def test_a_stage_of_36_blocks_moves_666_maps_untiled_and_251_in_groups_of_6():
    assert least_traffic(36).pairs == 666
    assert best_tile(36) == 6
    # Ahead of groups 7 + 13 + .. + 31 maps, within 21 + 5 * 15, and 30 partial sums written and read back.
    assert least_traffic(36, 6).pairs == 95 + 96 + 60 == 251


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 8, 23, 31, 36, 64])
@pytest.mark.parametrize("tile", [1, 2, 3, 6, 8, 100, None])
def test_the_least_traffic_is_that_of_a_run_through_the_stage(depth, tile):
    """The passes of a stage in groups, one after the other, each with what it reads and writes."""
    size, pairs, groups = tile or depth, 0, 0
    for start in range(0, depth, size):
        blocks = range(start, min(start + size, depth))
        if start > 0:
            pairs += len(range(start + 1)) + len(blocks)  # X_0 .. X_start into a partial sum a block
            groups += len(blocks)
        for block in blocks:
            own = range(start + 1 if start else 0, block + 1)
            pairs += len(own) + (start > 0)  # the maps finished since, and its partial sum read back
    found = least_traffic(depth, tile)
    assert found.pairs == pairs
    assert found.forward == pairs + 2 * depth  # branches and outputs
    assert found.backward == pairs + groups + 3 * (depth + 1) + 2 * depth
    projected = least_traffic(depth, tile, projection=True, norms=False)
    assert (projected.forward, projected.backward) == (found.forward, found.backward - 1 - 2 * depth)


def test_tiles_are_taken_where_they_gain_and_then_cost_grows_slower_than_the_square():
    assert [best_tile(depth) for depth in (1, 3, 6)] == [None] * 3
    for depth in (23, 36, 64):
        tiled, untiled = least_traffic(depth, best_tile(depth)), least_traffic(depth)
        assert sum(tiled[1:]) < sum(untiled[1:])
    growth = least_traffic(256, 16).pairs / least_traffic(64, 8).pairs
    assert growth < 4**1.6


def stage(depth: int, **options) -> nn.Module:
    network = bare_stage(depth).double()
    return ds.plug_in(network, **options) if options else network


def projected() -> nn.Sequential:
    conv = nn.Conv2d(SWEEP_WIDTH, SWEEP_WIDTH, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(SWEEP_WIDTH)).double()


class Severed(nn.Module):
    """A host's stage without shortcuts, last norms and activations; of a projection the convolution is run."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        projection = self.blocks[0].downsample
        self.aside = None if projection is None else projection[0](x)
        for b in self.blocks:
            x = b.conv3(b.act2(b.bn2(b.conv2(b.act1(b.bn1(b.conv1(x)))))))
        return x


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("projection", [False, True])
def test_a_hosts_shortcuts_move_what_its_operators_show(depth, projection):
    host, bare = stage(depth), stage(depth)
    for network in (host, bare):
        if projection:
            network[0][0].downsample = projected()
    bare[0] = Severed(bare[0])
    x = torch.randn(N, SWEEP_WIDTH, SIDE, SIDE, dtype=torch.float64).requires_grad_()
    grad_aside = torch.ones_like(x)

    def severed_step() -> None:
        outputs = [bare(x).sum(), bare[0].aside]
        pairs = [(y, g) for y, g in zip(outputs, (None, grad_aside), strict=True) if y is not None]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))

    moved = operators(lambda: host(x).sum().backward()).bytes
    x.grad = None  # else the second step adds to the first one's gradient
    moved -= operators(severed_step).bytes
    expected = sum(host_traffic(depth, projection, depth + projection)) * MAP_BYTES
    assert moved == pytest.approx(expected, rel=0.02)  # and the norms' numbers a channel


def step(network: nn.Module) -> None:
    x = torch.randn(N, SWEEP_WIDTH, SIDE, SIDE, dtype=torch.float64).requires_grad_()
    network(x).sum().backward()


def test_the_public_form_moves_all_that_its_pairs_ask_for():
    """Forward, a pair's batch norm reads 1 and writes 1, its convolution too, and the sum reads 2 and writes 1."""
    depth = 4
    public = stage(depth)
    public[0] = PublicStage(list(public[0].children())).double()
    found = shortcut_bytes(public, stage(depth), step)
    pairs = depth * (depth + 1) // 2
    assert found.untiled == found.least == sum(least_traffic(depth)[1:]) * MAP_BYTES
    # Backward: convolution reads 2 and writes 1, batch norm reads 2 and writes 1, the map's gradients add up: 3.
    by_hand = pairs * (2 + 2 + 3 + 3 + 3 + 3) + depth * (2 + 3 + 5)  # activations, and norms of branches
    assert found.moved == pytest.approx(by_hand * MAP_BYTES, rel=0.03)


@pytest.mark.parametrize("depth", [1, 4, 8])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_operator_moves_what_its_passes_read_and_write(norm, depth):
    """Beside the least: statistics of X_0 and each branch, and backwards the maps once more for their scales."""
    found = shortcut_bytes(stage(depth, norm=norm, backend="native"), stage(depth), step)
    pairs = depth * (depth + 1) // 2
    forward = (depth + 1) + (pairs + 2 * depth)  # feature_stats; dense_add
    sums = 3 * depth + (pairs - depth) + (pairs + depth)  # y, its gradient, G; later gradients; maps and branch
    others = 3 * depth + (2 + depth)  # pulls of branches and of X_0
    by_hand = forward + sums + others + 3  # and X_0 has two gradients
    assert found.moved == pytest.approx(by_hand * MAP_BYTES, rel=0.1)  # and numbers for each channel and image


def infer(network: nn.Module) -> None:
    with torch.inference_mode():
        network.eval()(torch.randn(N, SWEEP_WIDTH, SIDE, SIDE, dtype=torch.float64))


@pytest.mark.long
@pytest.mark.parametrize("depth", [1, 2, 8, 36])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_no_back_end_moves_less_than_the_least_and_the_fused_ones_little_more(depth, norm, projection, trains):
    def network(**options) -> nn.Module:
        made = bare_stage(depth).double()
        if projection:
            made[0][0].downsample = projected()
        return ds.plug_in(made, **options) if options else made

    run = step if trains else infer
    found = {
        backend: shortcut_bytes(network(norm=norm, backend=backend), network(), run, trains=trains)
        for backend in ("plain", "native")
    }
    for backend, bytes_ in found.items():
        assert 0 < bytes_.least <= bytes_.moved, backend
    assert found["native"].moved <= found["plain"].moved
    if depth > 1:
        assert found["native"].moved < LITTLE_MORE * found["native"].least

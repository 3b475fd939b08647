"""What several ranks do together: the exchange of rows, every layout beside one process, and the speed of their links."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from gpu_checks.configurations import compared
from gpu_checks.registry import Context, Result
from gpu_checks.timing import seconds_of
from gpu_checks.training import Settings, grid_of, losses_of, reference_losses, small_configuration
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowGradientSums
from overtok_megatron.ngram.exchange import FlatExchange
from overtok_megatron.parallel.splits import split_bounds

_LAYOUT_ERROR = 2e-4  # of the loss in float32: sums over ranks run in another order


@dataclass(frozen=True)
class Layout:
    """needs: the number of ranks must be a multiple of it."""

    settings: Settings = field(default_factory=dict)
    needs: int = 1
    quick: bool = False


def _layout(needs: int = 1, *, quick: bool = False, **parallel: object) -> Layout:
    return Layout({f"parallel.{key}": value for key, value in parallel.items()}, needs, quick)


LAYOUTS: dict[str, Layout] = {
    **{f"data, zero {stage}": _layout(zero_stage=stage, quick=stage == 2) for stage in range(4)},
    "data, zero 3, offload": _layout(zero_stage=3, offload_optimizer="cpu"),
    "data, host tables": Layout({"over_encoding.storage": "host"}),
    "tensor": _layout(2, tensor_parallel_size=2, quick=True),
    "tensor, sequence": _layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "context": _layout(2, context_parallel_size=2),
    "pipeline": _layout(2, pipeline_parallel_size=2, quick=True),
    "tensor, pipeline": _layout(4, tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True),
    "two-level exchange": Layout({"over_encoding.ranks_per_host": 2}, 4),
}


class OnRanks:
    """The check of one layout."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, context: Context) -> Result:
        settings = dict(LAYOUTS[self.name].settings)
        if settings.get("parallel.pipeline_parallel_size", 1) > 1:
            settings["micro_batches"] = 2
        losses = losses_of(context, small_configuration(context, context.cuda, settings))
        bf16 = settings | {"training.precision": "bf16"}
        narrow = losses_of(context, small_configuration(context, context.cuda, bf16))
        return compared(losses, narrow, reference_losses(context, "plain"), _LAYOUT_ERROR)


def exchange(context: Context) -> Result:
    """Fetched rows equal those of their owners, and owners receive the right gradient sums, also for hot and unused rows."""
    device, ranks = context.device, context.ranks
    total, width = 10_007, 24
    bounds = split_bounds(total, ranks)
    group = grid_of(context, small_configuration(context, context.cuda, {})).table_group
    assert group is not None
    kernels = choose_kernels("auto", device).rows
    flat = FlatExchange(bounds, group, kernels=kernels)
    table = torch.arange(total * width, dtype=torch.float32).view(total, width).to(device)
    own = table[bounds[context.rank] : bounds[context.rank + 1]]
    everyone = [_asked(rank, ranks, total) for rank in range(ranks)]
    ids = everyone[context.rank].to(device)
    plan = flat.plan(ids)
    rows = flat.start_fetch(plan, lambda index: own[index])()
    assert torch.equal(rows[plan.slots], table[ids]), "a row that was fetched is another one"
    gradient = torch.full((plan.count, width), float(context.rank + 1), device=device)
    index, sums = flat.send_gradients(plan, RowGradientSums(gradient, gradient.square().sum(1)))
    expected = torch.zeros(total)
    for rank, asked in enumerate(everyone):
        expected[asked.unique()] += rank + 1
    mine = expected[bounds[context.rank] : bounds[context.rank + 1]].to(device)
    assert torch.equal(index, mine.nonzero().squeeze(1)), "gradients reached other rows"
    assert torch.equal(sums.total, mine[index].unsqueeze(1).expand_as(sums.total)), "a sum of gradients is wrong"
    return Result(True, f"{plan.count} rows of {total} fetched, gradients returned", "equal bits")


def _asked(rank: int, ranks: int, total: int) -> torch.Tensor:
    """What a rank asks for: random rows of every owner, one hot row, and in the last rank's case nothing at all."""
    if ranks > 1 and rank == ranks - 1:
        return torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, total, (900,), generator=generator)
    ids[::3] = 5
    return ids.view(3, 300)


def links(context: Context) -> Result:
    """GB/s that each rank sends in a large all-to-all, and the bus bandwidth of a large all-reduce."""
    group = grid_of(context, small_configuration(context, context.cuda, {})).table_group
    ranks, device = context.ranks, context.device
    count = (2**26 if context.cuda else 2**18) // ranks * ranks  # float32 values
    sent = torch.ones(count, device=device)
    received = torch.empty_like(sent)

    def all_to_all() -> None:
        dist.all_to_all_single(received, sent, group=group)

    exchanged = seconds_of(all_to_all, device)
    assert torch.equal(received, sent), "an all-to-all brought other values"
    reduced = seconds_of(lambda: dist.all_reduce(received, group=group), device, rounds=5)
    moved = 4 * count * (ranks - 1) / ranks
    rates = {"all_to_all": moved / exchanged, "all_reduce": 2 * moved / reduced}
    return Result(
        None,
        f"all-to-all {rates['all_to_all'] / 1e9:.1f} GB/s per rank, all-reduce {rates['all_reduce'] / 1e9:.1f} GB/s bus",
        f"of {ranks} ranks, {4 * count / 1e6:.0f} MB",
        rates,
    )

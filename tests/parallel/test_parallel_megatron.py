"""Each split layer and the fused cross entropy against megatron-core's: outputs and all gradients, on 2 ranks.

megatron-core cuts the shared full weights by its own rules, so that the layout of the shards is compared too. Its tensors
are [s, b, h], ours [b, s, h]. Shapes: b batch, s sequence, h hidden, V vocabulary.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.parallel import cross_entropy as module
from overtok_megatron.parallel.collectives import all_gather_sequence, copy_to_group
from overtok_megatron.parallel.linear import MergedColumnParallelLinear, RowParallelLinear
from overtok_megatron.parallel.splits import own_part, split_range, splits_of
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead
from support.distributed_harness import run_ranks

core = pytest.importorskip("megatron.core", reason="the layers to compare with, in the test extra")

BATCH, SEQ, WIDTH, VOCAB = 3, 8, 20, 48  # no two alike: an exchanged dimension must show
OUTPUTS = {"q": 12, "k": 4, "v": 28}
INPUTS = 36
UPSTREAM = 0.37  # of the loss: a backward that drops its incoming gradient must show
# relative, by norm: float32 logits, exponentials and sums over tokens and ranks, each added in another order
TOLERANCE = 1e-6


def _whole(*shape: int, seed: int) -> Tensor:
    """Whole numbers in float32: their products and sums stay below 2^24, hence exact in any order, across ranks too."""
    return torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(seed: int) -> Tensor:
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0], tokens[-1, -1] = 0, VOCAB - 1  # the two ends of the vocabulary
    return tokens


def _turn(x: Tensor | None) -> Tensor | None:
    """[b, s, h] to [s, b, h] and back; None stays, for the comparison to report."""
    return None if x is None else x.transpose(0, 1).contiguous()


def _leaf(x: Tensor, *, turned: bool = False) -> Tensor:
    return (x.transpose(0, 1) if turned else x).clone(memory_format=torch.contiguous_format).requires_grad_()


def _own(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    start, stop = split_range(x.shape[dim], dist.get_world_size(group), dist.get_rank(group))
    return x.narrow(dim, start, stop - start)


def _compare(ours: Tensor | None, theirs: Tensor | None, what: str, tolerance: float = 0.0) -> None:
    assert ours is not None, f"{what}: ours is missing"
    assert theirs is not None, f"{what}: theirs is missing"
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    assert theirs.any(), f"{what}: zero everywhere shows nothing"
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    assert error <= tolerance, f"{what}: off by {error:.1e}"


def _load(weight: nn.Parameter, full: Tensor) -> None:
    """Our part of `full`, by the metadata that checkpoints are cut by."""
    assert splits_of(weight)
    weight.data.copy_(own_part(full, splits_of(weight)))


def _settings(full: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> dict[str, Any]:
    """For one of their layers; its CPU initialisation draws a full weight, here `full`, and cuts its own part."""
    config = core.ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(group),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return {"config": config, "init_method": lambda weight: weight.copy_(full), "tp_group": group}


def _their_column(full: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Any:
    settings = _settings(full, group, sequence_parallel)
    return core.tensor_parallel.ColumnParallelLinear(full.shape[1], len(full), bias=False, **settings)


def _check_column(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """Our one product of several weights against one layer for each of them."""
    what = f"column, sequence parallel {sequence_parallel}"
    ours = MergedColumnParallelLinear(WIDTH, OUTPUTS, group=group, sequence_parallel=sequence_parallel)
    whole = _whole(BATCH, SEQ, WIDTH, seed=1)
    x = _own(whole, group, 1) if sequence_parallel else whole
    our_x, their_x = _leaf(x), _leaf(x, turned=True)
    theirs, upstream = {}, []
    for seed, (name, size) in enumerate(OUTPUTS.items(), start=2):
        full = _whole(size, WIDTH, seed=seed)
        _load(getattr(ours, name), full)
        theirs[name] = _their_column(full, group, sequence_parallel)
        upstream.append(_own(_whole(BATCH, SEQ, size, seed=seed + 10), group, 2))
    found = ours(our_x).split(ours.sizes, dim=-1)
    torch.autograd.backward(found, upstream)
    for i, (name, layer) in enumerate(theirs.items()):
        out, _ = layer(their_x)
        out.backward(_turn(upstream[i]))
        _compare(getattr(ours, name), layer.weight, f"{what}, shard of {name}")
        _compare(found[i], _turn(out), f"{what}, output {name}")
        _compare(getattr(ours, name).grad, layer.weight.grad, f"{what}, gradient of {name}")
    _compare(our_x.grad, _turn(their_x.grad), f"{what}, gradient of the input")


def _check_row(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    what = f"row, sequence parallel {sequence_parallel}"
    full = _whole(WIDTH, INPUTS, seed=1)
    ours = RowParallelLinear(INPUTS, WIDTH, group=group, sequence_parallel=sequence_parallel)
    theirs = core.tensor_parallel.RowParallelLinear(
        INPUTS,
        WIDTH,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        **_settings(full, group, sequence_parallel),
    )
    _load(ours.weight, full)
    x, upstream = _own(_whole(BATCH, SEQ, INPUTS, seed=2), group, 2), _whole(BATCH, SEQ, WIDTH, seed=3)
    if sequence_parallel:
        upstream = _own(upstream, group, 1)
    our_x, their_x = _leaf(x), _leaf(x, turned=True)
    found, (expected, _) = ours(our_x), theirs(their_x)
    found.backward(upstream)
    expected.backward(_turn(upstream))
    _compare(ours.weight, theirs.weight, f"{what}, shard")
    _compare(found, _turn(expected), f"{what}, output")
    _compare(ours.weight.grad, theirs.weight.grad, f"{what}, gradient of the weight")
    _compare(our_x.grad, _turn(their_x.grad), f"{what}, gradient of the input")


def _check_embedding(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    what = f"embedding, sequence parallel {sequence_parallel}"
    full = _whole(VOCAB, WIDTH, seed=1)
    ours = VocabParallelEmbedding(VOCAB, WIDTH, group=group, sequence_parallel=sequence_parallel)
    theirs = core.tensor_parallel.VocabParallelEmbedding(
        VOCAB, WIDTH, reduce_scatter_embeddings=sequence_parallel, **_settings(full, group, sequence_parallel)
    )
    _load(ours.weight, full)
    tokens, upstream = _tokens(seed=2), _whole(BATCH, SEQ, WIDTH, seed=3)
    found, expected = ours(tokens), theirs(tokens)
    if sequence_parallel:  # only then does theirs turn to [s, b, h]
        upstream = _own(upstream, group, 1)
        expected = _turn(expected)
    found.backward(upstream)
    expected.backward(upstream)
    _compare(ours.weight, theirs.weight, f"{what}, shard")
    _compare(found, expected, f"{what}, output")
    _compare(ours.weight.grad, theirs.weight.grad, f"{what}, gradient of the weight")


def _check_cross_entropy(group: dist.ProcessGroup, sequence_parallel: bool, kernels: str, ignored: bool) -> None:
    """Ours from hidden states against their output layer and their loss of its logits.

    Neither loss sums the gradient of hidden over ranks: that is done by our entry, and by their column-parallel layer.
    """
    what = f"cross entropy, sequence parallel {sequence_parallel}, kernels {kernels}, ignored {ignored}"
    full = 0.5 * _normal(VOCAB, WIDTH, seed=1)
    head = VocabParallelHead(VOCAB, WIDTH, group=group)
    _load(head.weight, full)
    theirs = _their_column(full, group, sequence_parallel)
    whole, targets = _normal(BATCH, SEQ, WIDTH, seed=2), _tokens(seed=3)
    x = _own(whole, group, 1) if sequence_parallel else whole
    our_x, their_x = _leaf(x), _leaf(x, turned=True)
    skipped = (torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 5 == 1) & ignored
    entered = all_gather_sequence(our_x, group, 1) if sequence_parallel else copy_to_group(our_x, group)
    objective, cross_entropy = module.linear_cross_entropy(
        entered.flatten(0, 1),
        head.weight,
        targets.masked_fill(skipped, module.IGNORE_INDEX).flatten(),
        vocab_start=head.vocab_start,
        group=group,
        kernels=choose_kernels(kernels, torch.device("cpu")),
        # 7 tokens at a time: several chunks, the last one short
        bound=module.ChunkBound(values=7 * VOCAB, tokens=7, even=False, multiple=1),
    )
    logits, _ = theirs(their_x)
    losses = core.tensor_parallel.vocab_parallel_cross_entropy(logits, targets.t().contiguous())
    expected = losses.masked_fill(skipped.t(), 0.0).sum()  # theirs knows no ignored target: its callers mask the losses
    (objective * UPSTREAM).backward()
    (expected * UPSTREAM).backward()
    _compare(head.weight, theirs.weight, f"{what}, shard")
    _compare(objective.detach(), expected.detach(), f"{what}, objective", TOLERANCE)
    _compare(cross_entropy, expected.detach(), f"{what}, summed cross entropy", TOLERANCE)
    _compare(head.weight.grad, theirs.weight.grad, f"{what}, gradient of the weight", TOLERANCE)
    _compare(our_x.grad, _turn(their_x.grad), f"{what}, gradient of hidden", TOLERANCE)


def _check_all() -> None:
    dist.init_process_group("gloo")
    core.parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    group = core.parallel_state.get_tensor_model_parallel_group()
    for sequence_parallel in (False, True):
        if sequence_parallel:  # their buffers for it are placed by this call, and no option says otherwise
            torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
        _check_column(group, sequence_parallel)
        _check_row(group, sequence_parallel)
        _check_embedding(group, sequence_parallel)
        for kernels, ignored in itertools.product(("torch", "auto"), (False, True)):
            _check_cross_entropy(group, sequence_parallel, kernels, ignored)
    dist.destroy_process_group()


def test_layers_equal_those_of_megatron_core() -> None:
    run_ranks(2, _check_all)

"""The whole model over two tensor-parallel ranks against the unsharded one: weights, logits, loss and every gradient."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.config.counts import bytes_per_rank
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.heads import LaterTokens
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.parallel.splits import full_shape, named_generator, own_part, splits_of
from support.assembling import cpu_model, cpu_tables
from support.distributed_harness import run_ranks

CPU = torch.device("cpu")
VOCAB, SEQ, EOD = 101, 10, 3
OVER = {"enabled": True, "ngram_order": 3, "num_slices": 2, "table_rows": 61, "init_std": 0.5, "combine": "sum"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "plain": ({}, {}, "torch"),
    "plain, tied, compiled loops": ({"tie_word_embeddings": True}, {}, "auto"),
    "over-encoded": ({"num_key_value_heads": 2}, OVER, "torch"),
    "over-encoded, tied": ({"tie_word_embeddings": True}, OVER | {"combine": "mean", "ngram_order": 2}, "auto"),
    "output tables, tied": ({"tie_word_embeddings": True}, {}, "torch"),
    "output tables, low rank": ({}, OVER, "auto"),
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "output tables, tied": {"num_tokens": 3, "loss_weights": [0.3, 0.2]},
    "output tables, low rank": {"num_tokens": 3, "loss_weights": [0.3, 0.2], "low_rank": 5},
}


def configuration(name: str, sequence_parallel: bool, tensor_parallel_size: int) -> RunConfig:
    model, over, kernels = CASES[name]
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 62, "num_layers": 2,
                      "num_attention_heads": 4, "init_std": 0.1} | model,
            "over_encoding": over,
            "over_decoding": OUTPUTS.get(name, {}),
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": SEQ},
            "parallel": {"tensor_parallel_size": tensor_parallel_size, "sequence_parallel": sequence_parallel,
                         "zero_stage": 0},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output_directory": "none", "micro_batch_size": 2, "global_batch_size": 2, "train_iters": 1,
                         "precision": "fp32", "kernels": kernels, "z_loss": 1e-2},
        }
    )  # fmt: skip


def randomise_norms(model: nn.Module) -> None:
    """Norm weights other than ones, each the slice of one full vector."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            full = torch.empty(full_shape(weight)).normal_(1.0, 0.2, generator=named_generator(0, name))
            weight.data.copy_(own_part(full, splits_of(weight)))


def evaluate(name: str, sequence_parallel: bool, grid: ProcessGrid) -> dict[str, Any]:
    """One rank's weights, results and gradients of a case."""
    config = configuration(name, sequence_parallel, grid.shape.tensor)
    model = cpu_model(config, tensor_group=grid.tensor_group)
    initial = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    randomise_norms(model)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    targets = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    targets[1, 2:4] = -100
    tables, fetched = None, None
    if config.over_encoding.enabled:
        own_slice = grid.tensor_rank, grid.shape.tensor
        tables = cpu_tables(config, EOD, group=grid.table_group, sequence_slice=own_slice)
        fetched = tables.fetch_rows(tokens, training=True)
    with torch.no_grad():
        logits = model.logits(tokens, fetched)
    later = None
    if name in OUTPUTS:
        behind = [targets.roll(-ahead, 1) for ahead in (1, 2)]
        later = LaterTokens((behind[0], behind[1]), (), torch.tensor([1.1, 1.3]))
    result = model(tokens, fetched, targets, later=later)
    result.objective.backward()
    return {
        "initial": initial,
        "gradients": {name: weight.grad for name, weight in model.named_parameters()},
        "splits": {name: splits_of(weight) for name, weight in model.named_parameters()},
        "logits": logits,
        "objective": result.objective.item(),
        "cross_entropy": result.main_loss.item(),
        "later": {key: loss.item() for key, loss in result.auxiliary_losses.items()},
        "table_rows": None if tables is None else tables.store.rows.weight,
        "table_square": None if tables is None else tables.reduce_gradients(fetched, 1.0).global_squared_norm.item(),
        "printed": str(model),
    }


def rank_work() -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(tensor=2))
    results = [evaluate(name, sequence, grid) for name in CASES for sequence in (False, True)]
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Any]]]:
    return run_ranks(2, rank_work)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_one(ranks: list[list[dict[str, Any]]], name: str, sequence_parallel: bool) -> None:
    whole = evaluate(name, False, ProcessGrid.single())
    index = 2 * list(CASES).index(name) + sequence_parallel
    for rank in range(2):
        result = ranks[rank][index]
        torch.testing.assert_close(result["logits"], whole["logits"], rtol=1e-5, atol=1e-5)
        assert result["logits"].shape == (2, SEQ, VOCAB)
        assert result["objective"] == pytest.approx(whole["objective"], rel=1e-6)
        assert result["cross_entropy"] == pytest.approx(whole["cross_entropy"], rel=1e-6)
        assert result["objective"] > result["cross_entropy"] + 1e-3
        assert result["later"] == pytest.approx(whole["later"], rel=1e-6)
        assert len(result["later"]) == OUTPUTS.get(name, {}).get("num_tokens", 1) - 1
        assert result["initial"].keys() == whole["initial"].keys()
        if whole["table_square"] is not None:
            assert whole["table_square"] > 0
            assert result["table_square"] == pytest.approx(whole["table_square"], rel=1e-5)

        def own(full: Tensor, parameter: str, result: dict[str, Any] = result) -> Tensor:
            return own_part(full, result["splits"][parameter])

        for parameter, weight in result["initial"].items():
            assert torch.equal(weight, own(whole["initial"][parameter], parameter)), parameter
            wanted = own(whole["gradients"][parameter], parameter)
            assert wanted.norm() > 0, parameter
            distance = (result["gradients"][parameter] - wanted).norm() / wanted.norm()
            assert distance < 2e-5, (parameter, rank, distance)
    if whole["table_rows"] is not None:
        assert torch.equal(torch.cat([ranks[rank][index]["table_rows"] for rank in range(2)]), whole["table_rows"])


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_split_and_cover_the_whole(ranks: list[list[dict[str, Any]]], name: str) -> None:
    config = configuration(name, False, 2)
    first, second = (ranks[rank][2 * list(CASES).index(name)] for rank in range(2))
    for parameter, splits in first["splits"].items():
        others = second["splits"][parameter]
        if not splits:
            assert not others
            assert parameter.endswith(("attention_norm.weight", "mlp_norm.weight", "head.norm.weight", "projection"))
            continue
        (split,), (other,) = splits, others
        assert (split.dim, split.size) == (other.dim, other.size)
        assert (split.start, split.stop, other.stop) == (0, other.start, split.size), parameter
    size = sum(weight.numel() for weight in first["initial"].values())
    assert bytes_per_rank(config, 2).weights == 4 * size  # the first rank is the fullest


def test_printing_a_model_names_its_shards(ranks: list[list[dict[str, Any]]]) -> None:
    for rank, vocabulary in enumerate(("0..51", "51..101")):
        printed = ranks[rank][0]["printed"]
        assert f"vocab {vocabulary} of 101, tied=False" in printed
        assert f"{vocabulary} of 101, hidden_size=48" in printed
        assert "24 of 48, eps=1e-06" in printed
        assert f"in_features=62, out_features=48, rank {rank} of 2" in printed
        assert "2 x Block" in printed  # equal layers are printed once
        assert printed.count(f"rank {rank} of 2") == 4
    assert "rank 0 of 1" in evaluate("plain", False, ProcessGrid.single())["printed"]

"""Multi-token prediction in one process: its losses and every gradient against formulas in float64, and transformers' layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.heads import ForwardResult, LaterTokens
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.training.later_tokens import later_inputs, later_targets
from support.assembling import cpu_model, cpu_tables
from support.formula_model import FormulaModel

EOD, VOCAB, LENGTH, BATCH = 3, 37, 9, 4
OVER = {"enabled": True, "ngram_order": 3, "num_slices": 1, "table_rows": 41, "row_width": 8, "collision_check": "warn",
        "init_std": 0.5, "row_dtype": "float32", "added": [{"orders": [2], "table_rows": 23}]}  # fmt: skip
LLAMA = {"norm_placement": "pre", "qk_norm": "none"}
TIED = {"tie_word_embeddings": True}


def configuration(depth: int, *, model: dict[str, Any], over: bool, within: bool = False, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
                      "num_attention_heads": 4, "num_key_value_heads": 2, "init_std": 0.2} | model,
            "over_encoding": OVER if over else {},
            "multi_token_prediction": {"depth": depth, "loss_weight": 0.3},
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": LENGTH, "document_attention": "within" if within else "across"},
            "parallel": {"zero_stage": 0},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output_directory": "none", "micro_batch_size": BATCH, "global_batch_size": BATCH,
                         "train_iters": 1, "precision": "fp32", "kernels": "torch"} | training,
        }
    )  # fmt: skip


def sample(depth: int) -> Tensor:
    """[BATCH, s + 1 + D] with ends of documents; the stream ends within the further tokens of the last sequence."""
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1 + depth), generator=torch.Generator().manual_seed(depth))
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.15] = EOD
    tokens[-1, LENGTH + 1 :] = IGNORE_INDEX
    return tokens


def heads_input(config: RunConfig, tokens: Tensor) -> LaterTokens:
    depth, length = config.multi_token_prediction.depth, config.data.seq_length
    end = EOD if config.data.document_attention == "within" else None
    targets = later_targets(tokens, depth, end)
    scored = torch.stack([(target != IGNORE_INDEX).sum() for target in targets])
    scales = torch.where(scored > 0, tokens.shape[0] * length / scored.clamp(min=1), 0.0).float()
    return LaterTokens(tuple(targets), tuple(later_inputs(tokens, length, depth)), scales)


def run_model(config: RunConfig, model: Transformer, tokens: Tensor) -> tuple[ForwardResult, FetchedRows | None]:
    """The losses of one micro-batch, and the rows with their gradients once backward has run."""
    depth, length = config.multi_token_prediction.depth, config.data.seq_length
    fetched = None
    if config.over_encoding.enabled:
        known = torch.where(tokens == IGNORE_INDEX, 0, tokens)[:, : length + depth]
        fetched = cpu_tables(config, EOD).fetch_rows(known, training=True, overlap=depth)
    later = heads_input(config, tokens) if depth else None
    return model(tokens[:, :length], fetched, tokens[:, 1 : length + 1], later=later), fetched


CASES = {
    "D = 1": (1, {}, False, False),
    "D = 1, over-encoded": (1, {}, True, False),
    "D = 1, tied, over-encoded, within documents": (1, TIED, True, True),
    "D = 2, tied": (2, TIED, False, False),
    "D = 2, over-encoded": (2, {}, True, False),
    "D = 2, Llama, over-encoded, within documents": (2, LLAMA, True, True),
}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_every_gradient_are_the_formulas(name: str, recompute: str) -> None:
    depth, shape, over, within = CASES[name]
    config = configuration(depth, model=shape, over=over, within=within, recompute=recompute)
    model, tokens = cpu_model(config, eod_id=EOD), sample(depth)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms: a weight of 1 would hide its place
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    result, fetched = run_model(config, model, tokens)
    (result.objective / (BATCH * LENGTH)).backward()

    exact = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    tables: list[Tensor] = []
    if over:
        store, space = cpu_tables(config, EOD).store, row_space(config.model, config.over_encoding)
        every = store.rows.weight.double()
        tables = [every[space.row_ids_of_table(table)].requires_grad_() for table in range(space.num_tables)]
    formula = FormulaModel(config, EOD, exact, tables)
    hidden = formula.main_hidden(tokens[:, :LENGTH])
    main = formula.cross_entropy(hidden, tokens[:, 1 : LENGTH + 1])
    later = formula.multi_token_losses(tokens, LENGTH, hidden)
    (main / (BATCH * LENGTH) + 0.3 / depth * torch.stack(later).sum()).backward()

    assert result.main_loss.item() == pytest.approx(main.item(), rel=1e-6)
    inputs = heads_input(config, tokens)
    assert [*result.auxiliary_losses] == [f"multi_token_{number}" for number in range(1, depth + 1)]
    for summed, mean, target in zip(result.auxiliary_losses.values(), later, inputs.targets, strict=True):
        scored = (target != IGNORE_INDEX).sum().item()
        assert 0 < scored < BATCH * LENGTH
        assert summed.item() / scored == pytest.approx(mean.item(), rel=1e-6)
    for parameter, weight in model.named_parameters():
        wanted = exact[parameter].grad
        assert weight.grad is not None and wanted is not None and wanted.any(), parameter
        assert (weight.grad - wanted).norm() <= 1e-5 * wanted.norm(), parameter
    if fetched is not None:
        check_row_gradients(config, fetched, tables)


def check_row_gradients(config: RunConfig, fetched: FetchedRows, tables: list[Tensor]) -> None:
    space = row_space(config.model, config.over_encoding)
    wanted = torch.zeros(space.total_rows, space.width, dtype=torch.float64)
    for number, rows in enumerate(tables):
        assert rows.grad is not None
        wanted[space.row_ids_of_table(number)] = rows.grad
    found = torch.zeros_like(wanted)
    found[fetched.rows.plan.local_row_of_slot] = fetched.rows.gradients(torch.device("cpu")).total.double()
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()

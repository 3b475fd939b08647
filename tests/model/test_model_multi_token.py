"""Multi-token prediction in one process: its losses and every gradient against formulas in float64, and transformers' layer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.derived import blocks_per_stage
from overtok_megatron.config.schema import ParallelConfig, RunConfig
from overtok_megatron.model.assembly import build_run_layers
from overtok_megatron.model.heads import ForwardResult, LaterTokens
from overtok_megatron.model.transformer import Stage, Transformer
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.training.later_tokens import later_inputs, later_targets
from support.assembling import cpu_model, cpu_tables, kernels_of
from support.formula_model import FormulaModel
from support.multi_token_layers import MultiTokenLayers, multi_token_names
from support.reference import hugging_face_model, hugging_face_names

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


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize(
    "shape",
    [{}, TIED, LLAMA, {"sliding_window": 3, "full_attention_interval": 2}],
    ids=["Olmo2", "tied", "Llama", "Olmo3"],
)
def test_losses_and_gradients_are_those_of_transformers_layers(kernels: str, shape: dict[str, Any]) -> None:
    """`MtpLayer` around the decoder layers of the model's own family; Olmo3's with full attention."""
    config = configuration(2, model=shape, over=False, kernels=kernels)
    model, tokens = cpu_model(config, eod_id=EOD), sample(2)
    theirs = hugging_face_model(config.model)
    theirs.load_state_dict({name: weight.detach().clone() for name, weight in hugging_face_names(model).items()})
    layers = MultiTokenLayers(model, theirs, config)
    result, _ = run_model(config, model, tokens)
    (result.objective / (BATCH * LENGTH)).backward()

    known = torch.where(tokens == IGNORE_INDEX, 0, tokens)[:, : LENGTH + 2]
    embedded = theirs.get_input_embeddings()(known)
    hidden = theirs.model(inputs_embeds=embedded[:, :LENGTH]).last_hidden_state
    losses, _ = layers.losses(hidden, embedded, tokens, None, EOD)
    main = torch.nn.functional.cross_entropy(theirs.lm_head(hidden).flatten(0, 1), tokens[:, 1 : LENGTH + 1].flatten())
    (main + 0.3 / 2 * torch.stack([*losses.values()]).sum()).backward()

    scored = [(target != IGNORE_INDEX).sum().item() for target in heads_input(config, tokens).targets]
    for number, (name, loss) in enumerate(losses.items()):
        assert result.auxiliary_losses[name].item() / scored[number] == pytest.approx(loss.item(), rel=1e-6)
    wanted = dict(theirs.named_parameters()) | dict(layers.named_parameters())
    found = hugging_face_names(model, lambda weight: weight.grad) | multi_token_names(model, lambda weight: weight.grad)
    for name, gradient in found.items():
        if name in wanted:  # a tied head is the embedding
            assert (gradient - wanted[name].grad).norm() <= 1e-5 * wanted[name].grad.norm(), name


@pytest.mark.parametrize("over", [False, True])
def test_heads_move_no_other_initial_weight(over: bool) -> None:
    with_heads, without = (
        dict(cpu_model(configuration(depth, model={}, over=over)).named_parameters()) for depth in (2, 0)
    )
    heads = with_heads.keys() - without.keys()
    assert heads == {name for name in with_heads if name.startswith("multi_token.")}
    for name, weight in without.items():
        assert torch.equal(weight, with_heads[name]), name
    first, second = (with_heads[f"multi_token.layers.{index}.projection.weight"] for index in (0, 1))
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.2, rel=0.1)


def test_evaluation_runs_no_head() -> None:
    """Without the tokens behind its inputs a model with heads computes what it would without them, bit for bit."""
    config, tokens = configuration(2, model={}, over=True), sample(2)[:, : LENGTH + 1]
    results = []
    for depth in (2, 0):
        fetched = cpu_tables(config, EOD).fetch_rows(tokens[:, :-1])
        model = cpu_model(configuration(depth, model={}, over=True)).eval()
        results.append(model(tokens[:, :-1], fetched, tokens[:, 1:]))
    assert torch.equal(results[0].objective, results[1].objective)
    assert results[0].auxiliary_losses == {}


EXPERTS = {"norm_placement": "pre", "num_experts": 5, "num_experts_per_token": 2}


@pytest.mark.parametrize(
    ("shape", "over"), [({}, False), (TIED, True), (LLAMA | {"head_size": 6}, True), (EXPERTS, True)]
)
def test_counts_are_those_of_the_built_model(shape: dict[str, Any], over: bool) -> None:
    config = configuration(2, model=shape, over=over)
    model, counts = cpu_model(config), parameter_counts(config)
    assert model.multi_token is not None
    assert counts.multi_token == sum(weight.numel() for weight in model.multi_token.parameters())
    assert counts.dense == sum(weight.numel() for weight in model.parameters())
    idle = [weight[2:].numel() for name, weight in model.named_parameters() if ".experts_" in name]
    assert counts.idle == sum(idle)
    assert bytes_per_rank(config, 1).weights == 4 * counts.dense


@pytest.mark.parametrize(("shape", "over"), [({}, False), (TIED, True), (EXPERTS, True)])
def test_flops_of_products_are_those_that_torch_counts(shape: dict[str, Any], over: bool) -> None:
    config = configuration(2, model=shape, over=over)
    model = cpu_model(config)
    with FlopCounterMode(display=False) as counter:
        run_model(config, model, sample(2))[0].objective.backward()
    products = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
    by_operator = counter.get_flop_counts()["Global"]
    counted = sum(flops for name, flops in by_operator.items() if str(name).split(".")[-1] in products)
    attention = 12.0 * 16 * (2 + 2) * LENGTH / 2  # of the layers and of the depths
    norms = sum(weight.numel() for weight in model.parameters() if weight.ndim < 2)
    assert flops_per_token(config) - attention - 6 * norms == pytest.approx(counted / (BATCH * LENGTH))


def test_the_last_stage_counts_heads_and_copies() -> None:
    """The fullest of two stages by formula is the last stage as it is built, with copies of the embedding's parts."""
    for shape in ({}, TIED):
        config = configuration(2, model=shape, over=True)
        config = config.model_copy(update={"parallel": ParallelConfig(pipeline_parallel_size=2, zero_stage=0)})
        layers = build_run_layers(
            config, device=torch.device("cpu"), kernels=kernels_of(config), stage=Stage.of(1, blocks_per_stage(config))
        )
        parameters = {id(weight): weight for layer in layers.all for weight in layer.parameters()}
        assert bytes_per_rank(config, 2).weights == 4 * sum(weight.numel() for weight in parameters.values())


def test_the_lightest_partition_weighs_the_heads() -> None:
    """A depth of prediction is heavier than a block, so the last of two stages gets fewer blocks."""
    shape = {"num_layers": 6, "vocab_size": 8}
    for depth, wanted in ((0, [3, 3]), (1, [4, 2]), (3, [5, 1])):
        config = configuration(depth, model=shape, over=False)
        parallel = ParallelConfig(pipeline_parallel_size=2, pipeline_partition="parameters", zero_stage=0)
        assert blocks_per_stage(config.model_copy(update={"parallel": parallel})) == wanted

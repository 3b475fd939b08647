"""Every step's loss against the reference from the formula, on 1, 2 and 4 ranks: float32, 1e-5 relative."""

import pytest
import torch

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.assembling import cpu_model
from support.distributed_harness import run_ranks
from support.formula_cases import EOD, SEQ, STEPS, Case, case_config, stream
from support.reference import Reference, hugging_face_names

Result = tuple[list[float], dict[str, torch.Tensor], torch.Tensor, list[float]]


def train_cases(cases: list[Case]) -> list[Result]:
    """One rank's work for each case: losses, its dense weights by name, its table rows, and norms before clipping."""
    results = []
    for case in cases:
        config = case_config(case)
        grid = start_processes(config, torch.device("cpu"))
        engine = TrainingEngine(config, grid, torch.device("cpu"), EOD)
        ranks = grid.shape.data
        tokens = stream(config.model.vocab_size)
        losses, norms = [], []
        for step in range(STEPS):
            own = tokens[step].view(engine.num_micro_batches, ranks, -1, SEQ + 1)[:, grid.data_rank]
            result = engine.step(own, config.optimizer.learning_rate)
            losses.append(result.loss)
            norms.append(result.grad_norm)
        assert engine.tables is not None
        dense = {name: weight.clone() for name, weight in engine.dense_weights().items()}
        results.append((losses, dense, engine.tables.store.rows.weight.clone(), norms))
    return results


ADDED = [{"orders": [4], "table_rows": 31}]
FORMULA = [
    Case("n2 k1 sum", {"ngram_order": 2, "num_slices": 1, "combine": "sum"}),
    Case("n2 k4 scaled, ignore", {"ngram_order": 2, "num_slices": 4, "combine": "scaled", "boundary": "ignore"}),
    Case("n3 k2 mean"),
    Case("n3 k4, sgd and clipping", {"num_slices": 4, "optimizer": "sgd"}, optimizer={"gradient_clipping": 0.1}),
    Case("n4 k1, adagrad", {"ngram_order": 4, "num_slices": 1, "optimizer": "rowwise_adagrad", "boundary": "ignore"}),
    Case("n4 k4, decay", {"ngram_order": 4, "num_slices": 4, "weight_decay": 0.3, "combine": "sum"}),
    Case("n4 k2, no clipping", {"ngram_order": 4, "optimizer": "sgd"}, optimizer={"gradient_clipping": 0.0}),
    Case("overflow", {"ngram_order": 4, "num_slices": 1, "table_rows": 1009}, {"vocab_size": 100_278}),
    Case("tables smaller than the ranks", {"ngram_order": 2, "num_slices": 1, "table_rows": 2}),
    Case("tied head, z-loss, hash base", {"hash_base": 64, "combine": "sum"}, {"tie_word_embeddings": True},
         training={"z_loss": 1e-2}),
    Case("added groups", {"row_width": 8, "combine": "scaled", "optimizer": "rowwise_adagrad", "learning_rate_factor": 1.0,
                          "added": [{"orders": [4, 2], "table_rows": 7}, {"orders": [3], "num_slices": 3, "table_rows": 211}]}),
    Case("frozen ones, decay", {"frozen": True, "weight_decay": 0.3, "optimizer": "sgd", "added": [
        {"orders": [2, 3], "num_slices": 2, "table_rows": 151}, {"orders": [5], "table_rows": 83, "frozen": True}]}),
]  # fmt: skip
LAYOUTS = {
    1: FORMULA,
    2: [
        *FORMULA,
        *(Case(f"zero {stage}", {"optimizer": "sgd", "added": ADDED}, parallel={"zero_stage": stage}) for stage in (1, 2, 3)),
        Case("tensor parallel", {"optimizer": "sgd"}, parallel={"tensor_parallel_size": 2}),
        Case("tensor parallel, tied, zero 1", {"combine": "sum"}, {"tie_word_embeddings": True},
             parallel={"tensor_parallel_size": 2, "zero_stage": 1}),
        Case("sequence parallel", {"optimizer": "sgd", "added": ADDED},
             parallel={"tensor_parallel_size": 2, "sequence_parallel": True}),
        Case("sequence parallel, zero 2", parallel={"tensor_parallel_size": 2, "sequence_parallel": True, "zero_stage": 2}),
    ],
    4: [
        *FORMULA[2:5],
        *FORMULA[7:9],
        FORMULA[11],
        Case("two by two, zero 1", {"optimizer": "sgd"}, parallel={"tensor_parallel_size": 2, "zero_stage": 1}),
        Case("two by two, sequence parallel", parallel={"tensor_parallel_size": 2, "sequence_parallel": True}),
        Case("zero 3 of four", {"optimizer": "rowwise_adagrad"}, parallel={"zero_stage": 3},
             training={"micro_batch_size": 1}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_and_weights_equal_the_formula(world: int) -> None:
    torch.set_num_threads(1)
    cases = LAYOUTS[world]
    ranks = run_ranks(world, train_cases, cases, timeout=200)
    for index, case in enumerate(cases):
        reference = Reference(case_config(case), EOD)
        expected = [reference.step(batch) for batch in stream(reference.config.model.vocab_size)]
        for rank in range(world):
            assert ranks[rank][index][0] == pytest.approx(expected, rel=1e-5), (case.name, rank)
            assert ranks[rank][index][3] == pytest.approx(reference.norms, rel=1e-4), (case.name, rank)
        rows = torch.cat([result[index][2] for result in ranks])
        difference = (rows - reference.rows()).abs()
        if reference.config.over_encoding.optimizer == "adam":
            # It divides by the root of a gradient that may be rounding noise: a few numbers of those rows move freely.
            assert difference.quantile(0.995) < 1e-5 and difference.max() < 1e-3, case.name
        else:
            assert difference.max() < 1e-6, case.name
        if case.parallel.get("tensor_parallel_size", 1) == 1:
            check_dense(case, ranks[0][index][1], reference)


def check_dense(case: Case, dense: dict[str, torch.Tensor], reference: Reference) -> None:
    model = cpu_model(case_config(case))
    model.load_state_dict(dense, strict=False)
    theirs = dict(reference.model.named_parameters())
    for name, weight in hugging_face_names(model).items():
        if name in theirs:
            distance = (weight - theirs[name]).norm() / theirs[name].norm()
            assert distance < 1e-4, (case.name, name, distance)


BF16 = [
    Case(
        f"zero {stage}",
        {"optimizer": "sgd"},
        model,
        {"zero_stage": stage},
        {"precision": "bf16", "micro_batch_size": size},
    )
    for stage, size in ((0, 4), (1, 2), (2, 2), (3, 2))
    for model in ({}, {"tie_word_embeddings": True})
]


def test_bfloat16_follows_the_formula_at_every_stage() -> None:
    """Losses to 0.3%, joint norms to 3%: what rounding to bfloat16 allows. Stage 0 once began Adam a step ahead: 1.4%."""
    ranks = run_ranks(2, train_cases, BF16, timeout=200)
    for index, case in enumerate(BF16):
        reference = Reference(case_config(case), EOD)
        expected = [reference.step(batch) for batch in stream(59)]
        assert ranks[0][index][0] == pytest.approx(expected, rel=3e-3), case.name
        assert ranks[0][index][3] == pytest.approx(reference.norms, rel=3e-2), case.name
        assert ranks[0][index][0] == ranks[1][index][0]

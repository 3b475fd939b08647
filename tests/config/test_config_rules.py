"""Rules across keys, collisions, derived sizes, DeepSpeed's dictionary."""

from typing import Any

import pytest

from overtok_megatron.config.collisions import collision_problem
from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.deepspeed_config import derive
from overtok_megatron.config.derived import accumulation_steps, blocks_per_stage, train_iters
from overtok_megatron.config.validation import validate
from overtok_megatron.errors import ConfigError
from support.config_faults import FAULTS, OVER, WORLD, Fault, make


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_valid_one(world: int) -> None:
    config = make(**OVER, over_encoding__num_slices=5, over_encoding__row_width=9)
    validate(config, world, lambda key: "here")
    assert accumulation_steps(config, world) == 8 // world


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.key)
def test_rules(fault: Fault) -> None:
    """One fault is one line."""
    with pytest.raises(ConfigError) as caught:
        validate(make(**fault.changes), WORLD, lambda key: "place")
    message = str(caught.value)
    assert message.startswith(f"place: {fault.key}: ")
    assert fault.way_out in message
    assert "\n" not in message


# METHOD's measurements (4M Zipf draws): sizes whose tokens share rows far more than a random hash's would, and others.
BAD = [(50280, 64 * 50280), (50280, 64 * 50280 + 1), (32000, 12_800_000), (128_000, 12_800_000), (64_000, 12_800_000)]
GOOD = [(50280, 3_200_000), (32000, 12_900_001), (128_000, 12_900_001), (50280, 12_800_000), (100_278, 12_800_000)]


@pytest.mark.parametrize(("base", "rows"), BAD)
def test_collisions_are_caught_and_mended(base: int, rows: int) -> None:
    problem = collision_problem(rows, base, 4)
    assert problem is not None
    assert abs(problem.proposed_rows - rows) <= base
    assert collision_problem(problem.proposed_rows, base, 4) is None


@pytest.mark.parametrize(("base", "rows"), GOOD)
def test_good_sizes_pass(base: int, rows: int) -> None:
    assert collision_problem(rows, base, 4) is None


def test_later_tables_are_judged_too() -> None:
    problem = collision_problem(1946, 1000, 4)  # tables of 1946, 1948, 1950, 1952 rows
    assert problem is not None
    assert problem.table == 3


def test_tokens_give_whole_steps() -> None:
    assert train_iters(make(training__train_iters=None, training__train_tokens=257)) == 2
    assert train_iters(make(training__train_iters=None, training__train_tokens=256)) == 1


def test_deepspeed_keys() -> None:
    derived = derive(make(parallel__zero_stage=2, deepspeed__zero_optimization={"overlap_comm": True}), 2)
    zero = derived["zero_optimization"]
    assert zero.pop("reduce_bucket_size") > 0
    assert zero == {"stage": 2, "overlap_comm": True}
    assert derived["bf16"] == {"enabled": True}
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["data_types"] == {"grad_accum_dtype": "fp32"}
    for raw in ({"zero_optimization": {"stage": 3}}, {"optimizer": {}}, {"fp16": {"enabled": True}}):
        with pytest.raises(ConfigError, match=r"deepspeed\."):
            derive(make().model_copy(update={"deepspeed": raw}), 2)
    derive(make().model_copy(update={"deepspeed": {"gradient_clipping": 1.0}}), 2)  # the same value is no contradiction


def test_deepspeeds_throughput_timer_runs_only_where_it_is_asked_for() -> None:
    def timer(**raw: Any) -> Any:
        return derive(make().model_copy(update={"deepspeed": raw}), 2)["timers"]

    assert timer() == {"throughput": {"enabled": False}}
    assert timer(timers={"throughput": {"enabled": True}}) == {"throughput": {"enabled": True}}
    assert timer(timers={"throughput": {"synchronized": False}})["throughput"] == {
        "enabled": False,
        "synchronized": False,
    }
    assert timer(timers=3) == 3  # for DeepSpeed's reader to refuse


def test_the_papers_counts() -> None:
    config = make(
        model__vocab_size=50280,
        model__hidden_size=1024,
        over_encoding__enabled=True,
        over_encoding__table_rows=12_800_000,
    )
    assert parameter_counts(config).tables == pytest.approx(13.1e9, rel=1e-3)


def test_bytes_fall_with_the_stage() -> None:
    sizes = [bytes_per_rank(make(parallel__zero_stage=stage, training__global_batch_size=4), 2) for stage in range(4)]
    assert sizes[1].optimizer * 2 == sizes[0].optimizer
    assert sizes[2].gradients < sizes[1].gradients
    assert sizes[3].weights < sizes[2].weights


def test_flops_count_the_head_and_no_look_up() -> None:
    small, large = make(), make(model__vocab_size=2000)
    assert flops_per_token(large) - flops_per_token(small) == 6 * 1000 * 48


def test_flops_count_what_a_token_meets() -> None:
    """Of experts those that it goes to; of positions those that a layer sees, on average."""
    experts = {"model__num_experts": 8, "model__num_experts_per_token": 2}
    router = 6 * 2 * 48 * 8
    assert flops_per_token(make(**experts)) - flops_per_token(make()) == 6 * 2 * 3 * 48 * 64 + router
    seen = (
        sum(min(position, 4) for position in range(1, 17)) / 16 - 0.5
    )  # half of a position's own product is not counted
    difference = flops_per_token(make()) - flops_per_token(
        make(model__sliding_window=4, model__full_attention_interval=2)
    )
    assert difference == pytest.approx(12 * 48 * (8 - seen))


@pytest.mark.parametrize(
    ("stages", "partition", "expected"),
    [
        (1, "uniform", [5]),
        (2, "uniform", [3, 2]),
        (3, "uniform", [2, 2, 1]),
        (3, "parameters", [1, 3, 1]),  # the embedding and the head weigh about two blocks each
        (3, [1, 4, 0], [1, 4, 0]),
    ],
)
def test_blocks_of_a_stage(stages: int, partition: Any, expected: list[int]) -> None:
    config = make(model__num_layers=5, parallel__pipeline_parallel_size=stages, parallel__pipeline_partition=partition,
                  model__vocab_size=700)  # fmt: skip
    assert blocks_per_stage(config) == expected


def test_context_ranks_are_data_ranks_to_deepspeed() -> None:
    config = make(parallel__context_parallel_size=2)
    assert accumulation_steps(config, 4) == 4
    derived = derive(config, 4)
    batch = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 4
    assert derived["train_batch_size"] == batch == 32


def test_stages_of_sequence_parallel_ranks_send_all_of_their_activations() -> None:
    config = make(
        parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2, parallel__sequence_parallel=True
    )
    assert derive(config, 4)["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}

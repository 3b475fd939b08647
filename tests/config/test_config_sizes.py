"""Sizes that no machine holds are refused at once, and what a message proposes is found without trying every number."""

import random
import time
from pathlib import Path

import pytest

from overtok_megatron.config.derived import blocks_per_stage
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.nearest import nearest_divisor, nearest_multiple
from overtok_megatron.config.validation import validate_host
from overtok_megatron.errors import ConfigError
from support.config_text import TABLES, refusal

AT_ONCE = 5.0  # seconds; a search that tries one number after the other takes minutes and more


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("overrides", "world", "parts"),
    [
        (["model.hidden_size=1000000000000000000"], 1, ["model.hidden_size: 1000000000000000000", "1048576"]),
        (["model.hidden_size=2_000_000_000"], 1, ["model.hidden_size: 2000000000", "less than or equal to 1048576"]),
        (["model.num_attention_heads=2000000001"], 1, ["model.num_attention_heads", "65536"]),
        (["model.num_layers=100000000000"], 1, ["model.num_layers", "65536"]),
        (["model.num_attention_heads=3", "model.hidden_size=1048576"], 1, ["does not divide", "2 does"]),
        ([], 1_000_000_000, ["--processes: 1000000000", "at most 1048576"]),
        ([], 10**30, ["--processes", "at most 1048576"]),
        (["parallel.tensor_parallel_size=3"], 2**20, ["does not divide the 1048576 ranks (--processes); 2 does"]),
        (["parallel.pipeline_parallel_size=1048576"], 2**20, ["leaves stages without a block", "2 is the most"]),
        (
            ["parallel.pipeline_parallel_size=1048576", "parallel.pipeline_partition=parameters"],
            2**20,
            ["leaves stages without a block"],
        ),
        (["training.global_batch_size=2147483647", "training.micro_batch_size=2"], 1, ["2147483646 is"]),
        ([*TABLES, "over_encoding.num_slices=2000000000"], 1, ["over_encoding.num_slices", "65536"]),
        (
            [*TABLES, "over_encoding.table_rows=64000000", "over_encoding.hash_base=32000000",
             "over_encoding.num_slices=65536", "over_encoding.row_width=1"],
            1,
            ["2.00 times the hash base", "51777088 is a good size nearby"],
        ),
        (
            [*TABLES, "over_encoding.table_rows=2000000", "over_encoding.hash_base=100000",
             "over_encoding.num_slices=65536", "over_encoding.row_width=1"],
            1,
            ["20.00 times the hash base 100000", "no size does"],
        ),
        ([*TABLES, "over_encoding.table_rows=10000000000000"], 1, ["over_encoding.table_rows", "1099511627776"]),
        (
            ["model.hidden_size=1048576", "model.intermediate_size=1048576", "model.num_layers=65536"],
            8,
            ["model.hidden_size: 1048576; makes", "TiB of dense weights", "no machine holds more than 64"],
        ),
        (
            [*TABLES, "over_encoding.table_rows=2006439618", "over_encoding.row_width=1048576"],
            1,
            ["over_encoding.table_rows: 2006439618; makes", "TiB of n-gram tables on one rank"],
        ),
        (
            ["training.micro_batch_size=2147483647", "training.global_batch_size=2147483647", "data.seq_length=65536"],
            1,
            ["training.micro_batch_size: 2147483647; makes", "TiB of activations"],
        ),
        (
            ["training.global_batch_size=2147483647", "data.seq_length=65536"],
            1,
            ["training.global_batch_size: 2147483647; makes", "TiB of tokens per step"],
        ),
        (["model.hidden_size=0x" + "f" * 5000], 1, ["command line: model.hidden_size", "5002 digits"]),
        (["model.hidden_size=" + "9" * 5000], 1, ["command line: model.hidden_size", "5000 digits"]),
        (["optimizer.learning_rate=1e300"], 1, ["optimizer.learning_rate", "less than or equal to 3.4e+38"]),
        (["data.train=" + "x" * 300], 1, ["data.train: 'xxx", "a name of 300 bytes", "at most 240"]),
        (["training.output_directory=" + "y/" * 1500], 1, ["training.output_directory: 'y/", "at most 2048 characters"]),
        (["training.seed=18446744073709551616"], 1, ["training.seed", "9223372036854775807"]),
    ],
)  # fmt: skip
def test_refused_at_once(run: Path, overrides: list[str], world: int, parts: list[str]) -> None:
    begin = time.monotonic()
    message = refusal(run, overrides, world)
    assert time.monotonic() - begin < AT_ONCE
    for part in parts:
        assert part in message


def test_the_nearest_divisor_is_that_of_a_search() -> None:
    draw = random.Random(7)
    for _ in range(3000):
        whole, wanted, unit = draw.randrange(1, 500), draw.randrange(1, 600), draw.choice([1, 1, 2, 3, 4, 6])
        fitting = [number for number in range(unit, whole + 1, unit) if whole % number == 0]
        expected = min(fitting, key=lambda number: (abs(number - wanted), number)) if fitting else None
        assert nearest_divisor(whole, wanted, multiple_of=unit) == expected
        multiples = range(unit, 1200, unit)
        assert nearest_multiple(unit, wanted) == min(multiples, key=lambda number: (abs(number - wanted), number))


@pytest.mark.timeout(30)
def test_blocks_of_many_stages(run: Path) -> None:
    config = load_config(
        run,
        ["model.num_layers=65536", "parallel.pipeline_parallel_size=4096", "parallel.pipeline_partition=parameters"],
    ).config
    counts = blocks_per_stage(config)
    assert sum(counts) == 65536
    assert max(counts) - min(counts[1:-1]) <= 1


def test_what_a_host_cannot_hold(run: Path) -> None:
    """Refused before a process is started: the kernel would kill it in the middle of its first step."""

    def refused(overrides: list[str], processes: int = 1) -> str:
        loaded = load_config(run, overrides)
        with pytest.raises(ConfigError) as caught:
            validate_host(loaded.config, processes, 24 * 2**30, loaded.locate)
        return str(caught.value)

    wide = ["model.hidden_size=100000", "model.intermediate_size=100000"]
    assert "model.hidden_size: 100000; the run needs at least 2,350.3 GiB" in refused(wide)
    assert "are dense weights and their optimizer, and this host has 24.0; use" in refused(wide)
    assert "are tokens per step" in refused(["training.global_batch_size=1000000000"])
    assert "--processes: 1000000; is more than this host can run" in refused([], 1_000_000)
    loaded = load_config(run, [])
    validate_host(loaded.config, 8, 24 * 2**30, loaded.locate)
    with pytest.raises(ConfigError, match=r"needs at least 0\.0 GiB"):
        validate_host(loaded.config, 8, 2**20, loaded.locate)

"""Loss curves kept beside the tests: a change that moves one fails, and has to say why it may.

`PYTHONPATH=tests python tests/training/test_golden_runs.py` writes new ones into golden_runs.json.
"""

import json
from pathlib import Path

import pytest
import torch

from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, layout, layout_config, own_tokens, stream

KEPT = Path(__file__).parent / "golden_runs.json"
CONFIGS = Path(__file__).parents[2] / "configs"
ADAGRAD = {"optimizer": "rowwise_adagrad", "combine": "scaled"}


def quickstart() -> RunConfig:
    """The over-encoded quickstart's model, with few tokens per step."""
    overrides = [
        "training.precision=fp32",
        "training.micro_batch_size=2",
        "training.global_batch_size=4",
        "data.seq_length=64",
        "over_encoding.row_dtype=float32",
        "over_encoding.state_dtype=float32",
    ]
    return load_config(str(CONFIGS / "quickstart_overtok.yaml"), overrides).config


def quickstart_losses() -> list[float]:
    """Eight steps on tokens with the frequencies of text (Zipf's law)."""
    config = quickstart()
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    generator = torch.Generator().manual_seed(3)
    weights = 1.0 / torch.arange(1, config.model.vocab_size + 1, dtype=torch.float64)
    tokens = torch.multinomial(weights, 8 * 4 * 65, replacement=True, generator=generator).view(8, 2, 2, 65)
    return [engine.step(batch, 3e-3).loss for batch in tokens]


def small_losses(short: str) -> list[float]:
    """Twenty steps of the matrix's model on a layout."""
    config = layout_config(layout(short, micro=3, over=ADAGRAD))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    return [engine.step(own_tokens(engine, batch), 3e-3).loss for batch in stream()]


RUNS = {
    "quickstart shape": (1, quickstart_losses, ()),
    "TP2xPP2": (4, small_losses, ("tp2 pp2 z1",)),
    "ZeRO 3": (2, small_losses, ("z3",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_the_kept_one(name: str) -> None:
    world, work, arguments = RUNS[name]
    (losses, *_) = run_ranks(world, work, *arguments)
    assert losses == pytest.approx(json.loads(KEPT.read_text())[name], rel=2e-5)  # processors differ in the last bits


if __name__ == "__main__":
    curves = {name: run_ranks(world, work, *rest)[0] for name, (world, work, rest) in RUNS.items()}
    KEPT.write_text(json.dumps(curves, indent=1) + "\n")

"""Two real runs of a tiny over-encoded model, float32 and bfloat16, on one tokenizer and corpus; and a plain model beside."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.inference.loading import TrainedModel, load_trained
from support.assembling import cpu_model
from support.distributed_harness import run_ranks

VOCAB, CONTEXT = 512, 64
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainedRuns:
    folder: Path

    def run(self, precision: str) -> Path:
        return self.folder / precision

    def trained(self, precision: str = "fp32") -> TrainedModel:
        return load_trained(self.run(precision), torch.device("cpu"))


def tiny_run_config(folder: Path, precision: str, *, over: bool = True) -> RunConfig:
    tables = {"enabled": True, "table_rows": 40_756, "combine": "sum", "storage": "device"}
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_layers": 2,
                "num_attention_heads": 2,
                "init_std": 0.1,
            },
            "over_encoding": tables if over else {},
            "tokenizer": {"path": str(folder / "tokenizer.model")},
            "data": {"train": str(folder / "train"), "validation": str(folder / "validation"), "seq_length": CONTEXT},
            "optimizer": {"learning_rate": 1e-2},
            "training": {
                "output_directory": str(folder / precision),
                "micro_batch_size": 8,
                "global_batch_size": 8,
                "train_iters": 20,
                "validation_interval": 10,
                "precision": precision,
            },
        }
    )


def train(folder: Path) -> None:
    from overtok_megatron.training.trainer import Trainer

    for precision in PRECISIONS:
        config = tiny_run_config(folder, precision)
        Path(config.training.output_directory).mkdir()
        assert Trainer(config, device=torch.device("cpu"), num_threads=1).run()


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> TrainedRuns:
    folder = tmp_path_factory.mktemp("trained")
    files = sotu_files()
    train_sentencepiece(files[:6], VOCAB, folder / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    prepare(files[:6], folder / "train", tokenizer)
    prepare(files[6:8], folder / "validation", tokenizer)
    prepare(files[8:9], folder / "other", tokenizer)
    run_ranks(1, train, folder)
    return TrainedRuns(folder)


@pytest.fixture(scope="session")
def plain_model(trained_runs: TrainedRuns) -> TrainedModel:
    """Without tables, with random weights that are sure of what they say."""
    config = tiny_run_config(trained_runs.folder, "fp32", over=False)
    model = cpu_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.0
    tokenizer = load_tokenizer("sentencepiece", trained_runs.folder / "tokenizer.model")
    return TrainedModel(config=config, model=model, tables=None, tokenizer=tokenizer, step=0)

"""A whole run of the over-encoded quickstart's shape on made text: interrupted and resumed, then used."""

import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_checks.registry import Context, Result
from gpu_checks.training import Settings, configuration
from overtok_megatron.config.loading import save_resolved
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.run_folder import RunFolder

_STEPS = 60
_SMALL_STEPS = 12  # on the CPU
_NEW_TOKENS = 12  # the prompts and these fit into the short context of the CPU's form


def made_text(sentences: int, seed: int) -> str:
    """Sentences of made-up words, frequent ones more often, which tend to follow each other in a fixed way."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioubcdklmnprst", k=draw.randint(2, 7))) for _ in range(400)]
    frequency = [1.0 / (rank + 2) for rank in range(len(words))]
    lines = []
    for _ in range(sentences):
        line = draw.choices(words, frequency, k=1)
        while len(line) < draw.randint(4, 20):
            follows = (7 * words.index(line[-1]) + 13) % len(words)
            line.append(words[follows] if draw.random() < 0.6 else draw.choices(words, frequency, k=1)[0])
        lines.append(" ".join(line).capitalize() + ".")
    return "\n".join(lines)


def _corpus(folder: Path, sentences: int) -> None:
    tokenizer = load_tokenizer("bytes", None)
    for name, count, seed in (("train", sentences, 1), ("validation", sentences // 10, 2)):
        text = folder / f"{name}.txt"
        text.write_text(made_text(count, seed), encoding="utf-8")
        prepare([text], folder / name, tokenizer)


def _settings(context: Context, folder: Path, steps: int) -> Settings:
    """The quickstart's shape (configs/quickstart_overtok.yaml), the rate constant so that a run's length does not show."""
    shape: Settings = {
        "model.vocab_size": 8192 if context.cuda else 512,
        "model.hidden_size": 128 if context.cuda else 32,
        "model.intermediate_size": 352 if context.cuda else 48,
        "model.num_layers": 3 if context.cuda else 1,
        "model.num_attention_heads": 2,
        "over_encoding.enabled": True,
        "over_encoding.table_rows": 1_053_639 if context.cuda else 40_756,
        "over_encoding.combine": "scaled",
        "over_encoding.init_std": 0.0,
        "data.seq_length": 128 if context.cuda else 32,
    }
    batch = context.ranks * (32 // context.ranks or 1)
    return shape | {
        "data.train": str(folder / "train"),
        "data.validation": str(folder / "validation"),
        "optimizer.learning_rate": 2e-3,
        "optimizer.min_learning_rate": 2e-3,
        "optimizer.warmup_iters": 5,
        "training.micro_batch_size": batch // context.ranks,
        "training.global_batch_size": batch,
        "training.deterministic": True,
        "training.train_iters": steps,
        "logging.tensorboard": False,
        "logging.progress_bar": "off",
    }


def _train(context: Context, folder: Path, name: str, steps: int, every: int | None) -> list[dict[str, Any]]:
    """Train, or go on, to `steps`; what the run recorded of every step so far."""
    from overtok_megatron.training.trainer import Trainer

    output = folder / name
    settings = _settings(context, folder, steps) | {"training.output_directory": str(output)}
    config = configuration(settings | ({} if every is None else {"checkpoint.interval": every}), context.ranks)
    if context.rank == 0:
        output.mkdir(exist_ok=True)
        save_resolved(config, RunFolder(output).config)
    _meet(context)
    run = Trainer(config, device=context.device, num_threads=torch.get_num_threads())
    assert run.run(), f"the run {name} did not reach step {steps}"
    _meet(context)
    return RunFolder(output).read_metrics()


def _meet(context: Context) -> None:
    if context.ranks > 1 and dist.is_initialized():
        dist.barrier()


def whole_run(context: Context) -> Result:
    """Losses of a run that was interrupted at two thirds equal those of one that was not; its model generates and scores."""
    steps = _STEPS if context.cuda else _SMALL_STEPS
    folder = context.folder / "run"
    if context.rank == 0:
        folder.mkdir()
        _corpus(folder, 4000 if context.cuda else 300)
    else:
        _wait_for(folder / "validation.json")
    whole = _train(context, folder, "whole", steps, None)
    _train(context, folder, "parts", 2 * steps // 3, steps // 3)
    parts = _train(context, folder, "parts", steps, steps // 3)
    keys = ("train/loss", "train/grad_norm")
    unequal = sum(any(a[key] != b[key] for key in keys) for a, b in zip(whole, parts, strict=True))
    fallen = whole[0]["train/loss"] - whole[-1]["train/loss"]
    assert fallen > 0 and math.isfinite(fallen), f"the loss rose by {-fallen}"
    expected = parts[-1]["validation/loss"]
    away = _scored_apart(context, folder, expected) if context.rank == 0 else 0.0
    _meet(context)
    return Result(
        unequal == 0 and away < 1e-4,
        f"{unequal} of {steps} resumed losses differ; scored loss off by {away:.0e}",
        "0; 1e-04 of the run's",
        {
            "losses": [record["train/loss"] for record in whole],
            "resumed": [record["train/loss"] for record in parts],
            "validation_loss": expected,
        },
    )


def _wait_for(path: Path) -> None:
    """The check's time limit ends this."""
    while not path.exists():
        time.sleep(0.05)


def _scored_apart(context: Context, folder: Path, expected: float) -> float:
    """Generate with the resumed model, twice the same, and score the validation set: distance from the run's metric."""
    from overtok_megatron.evaluation.perplexity import score_set
    from overtok_megatron.inference.generation import generate_tokens
    from overtok_megatron.inference.loading import load_trained
    from overtok_megatron.inference.sampling import Sampling

    trained = load_trained(folder / "parts", context.device)
    prompts = [list(b"The state of"), list(b"A")]
    texts = [generate_tokens(trained, prompts, Sampling(max_new_tokens=_NEW_TOKENS)) for _ in range(2)]
    assert texts[0] == texts[1], "greedy texts differ between two calls"
    assert all(texts[0]), "no token was generated"
    micro = trained.config.training.micro_batch_size
    loss = score_set(trained, str(folder / "validation"), micro).loss
    return abs(loss - expected) / expected

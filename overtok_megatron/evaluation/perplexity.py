"""Loss, perplexity and bits per byte of a trained model on prepared sets, scored as the trainer's own validation is."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.data.batches import validation_batches
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.errors import DataError
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.loss_metrics import bits_per_byte, metrics_of, perplexity

BATCH_TOKENS = 1 << 14  # in a batch, where the caller does not say how many sequences it has
_MOST_WINDOWS = 16


def windows_at_once(length: int) -> int:
    """How many sequences of `length` tokens a batch has, where the caller does not say: fewer of long ones."""
    return max(1, min(_MOST_WINDOWS, BATCH_TOKENS // length))


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """The mean loss of a model on a prepared set.

    data: the set's prefix. loss: nats per token. tokens: how many were scored, all of the set but its first. source_bytes: of
    the text before tokenizing, 0 = not known. name: what the run calls the set, "" = it has no name.
    """

    data: str
    loss: float
    tokens: int
    source_bytes: int
    name: str = ""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        return bits_per_byte(self.loss, self.tokens, self.source_bytes)


@torch.no_grad()
def score_set(
    trained: TrainedModel,
    prefix: str,
    batch: int | None = None,
    advance: Callable[[int], object] = lambda windows: None,
    *,
    name: str = "",
) -> SetScore:
    """Score every token of the set `prefix` except its first, each once, in windows of the trained context.

    batch: the most windows in a batch, None = as `windows_at_once` says. advance: called with the windows of each finished
    batch. Raises DataError where the set is missing or damaged, was made with another tokenizer, or holds nothing to score.
    """
    dataset = open_set(trained, prefix)
    device = trained.device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    length = trained.config.data.seq_length
    for inputs, targets in validation_batches(dataset, length, batch or windows_at_once(length), 0, 1):
        tokens, wanted = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)  # [b, s]
        fetched = trained.fetch_rows(tokens)
        total += trained.model(tokens, fetched, wanted).main_loss.double()
        count += int((targets != IGNORE_INDEX).sum())
        advance(len(inputs))
    return SetScore(
        data=prefix, loss=float(total) / count, tokens=count, source_bytes=dataset.manifest.source_bytes, name=name
    )


def open_set(trained: TrainedModel, prefix: str) -> IndexedDataset:
    """The set, where this model can be scored on it; raises as `score_set`."""
    dataset = IndexedDataset(prefix)
    if dataset.manifest.tokenizer_fingerprint != trained.tokenizer.fingerprint():
        raise DataError(
            f"{prefix}: was prepared with another tokenizer than the model's {trained.config.tokenizer.path}; prepare "
            "it again with that one"
        )
    if dataset.num_tokens < 2:
        raise DataError(f"{prefix}: holds {dataset.num_tokens} tokens, nothing to score")
    return dataset


def score_table(scores: Sequence[SetScore]) -> str:
    """Column-aligned, one row per set, by its name where it has one."""
    rows = [("set", "tokens", "bytes", "loss", "perplexity", "bits/byte")]
    rows += [
        (
            score.name or score.data,
            f"{score.tokens:,}",
            f"{score.source_bytes:,}",
            f"{score.loss:.4f}",
            f"{score.perplexity:.2f}",
            "unknown" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}",
        )
        for score in scores
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def score_json(scores: Sequence[SetScore], step: int) -> str:
    """One JSON object: the checkpoint's step, and the metrics of each set, unrounded."""
    records = [
        {**asdict(score), "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte} for score in scores
    ]
    return json.dumps({"step": step, "sets": records}, indent=1)


def score_metrics(scores: Sequence[SetScore]) -> dict[str, float]:
    """Every metric of every set, as data/code/loss, or by the set's name where it has one."""
    return {
        f"{score.name or score.data}/{metric}": value
        for score in scores
        for metric, value in metrics_of(score.loss, score.tokens, score.source_bytes).items()
    }

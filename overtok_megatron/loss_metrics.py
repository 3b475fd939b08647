"""What is derived from a loss in nats per token: perplexity, and bits per byte of the text, which compares across tokenizers.

Also the names of a run's validation metrics: validation/loss, or validation/NAME/loss for a set that has a name.
"""

import math
from collections.abc import Mapping


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is above the largest float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def bits_per_byte(loss: float, tokens: int, source_bytes: int) -> float | None:
    """Bits per byte of the text that `tokens` tokens of mean `loss` came from; None where its size is not known (0)."""
    return loss * tokens / (math.log(2.0) * source_bytes) if source_bytes else None


def metrics_of(loss: float, tokens: int, source_bytes: int) -> dict[str, float]:
    """Loss, perplexity and bits per byte, by name; without the last where the size of the text is not known."""
    bits = bits_per_byte(loss, tokens, source_bytes)
    known = {} if bits is None else {"bits_per_byte": bits}
    return {"loss": loss, "perplexity": perplexity(loss), **known}


def validation_metrics(name: str, loss: float, tokens: int, source_bytes: int) -> dict[str, float]:
    """What a run reports for the validation set `name` ("" = a set without a name), by the names of its metrics."""
    prefix = f"validation/{name}/" if name else "validation/"
    return {prefix + metric: value for metric, value in metrics_of(loss, tokens, source_bytes).items()}


def validation_losses(record: Mapping[str, float]) -> dict[str, float]:
    """The validation losses of a record by the names of their sets, in the record's order; empty where it has none."""
    parts = {key: key.split("/") for key in record}
    return {
        "/".join(part[1:-1]): record[key]
        for key, part in parts.items()
        if part[0] == "validation" and part[-1] == "loss"
    }

"""What a loss in nats a token means: perplexity, and bits a byte of the text, which compares across tokenizers."""

import math


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that passes the largest float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def bits_per_byte(loss: float, tokens: int, source_bytes: int) -> float | None:
    """Bits that `tokens` tokens of mean `loss` cost for each byte of the text that they came from; None: size not known (0)."""
    return loss * tokens / (math.log(2.0) * source_bytes) if source_bytes else None

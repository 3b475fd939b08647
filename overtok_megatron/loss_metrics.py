"""What a loss in nats a token means: perplexity, and bits a byte of the text, which compares across tokenizers.

And the names under which a run reports them: validation/loss, or validation/NAME/loss of a set that has a name.
"""

import math
from collections.abc import Mapping


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that passes the largest float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def bits_per_byte(loss: float, tokens: int, source_bytes: int) -> float | None:
    """Bits that `tokens` tokens of mean `loss` cost for each byte of the text that they came from; None: size not known (0)."""
    return loss * tokens / (math.log(2.0) * source_bytes) if source_bytes else None


def figures(loss: float, tokens: int, source_bytes: int) -> dict[str, float]:
    """All that a loss is reported as, by name; without bits per byte where the size of the text is not known."""
    bits = bits_per_byte(loss, tokens, source_bytes)
    known = {} if bits is None else {"bits_per_byte": bits}
    return {"loss": loss, "perplexity": perplexity(loss), **known}


def validation_figures(name: str, loss: float, tokens: int, source_bytes: int) -> dict[str, float]:
    """What a run reports of the validation set `name` ("" = of one without): its figures by their metrics' names."""
    prefix = f"validation/{name}/" if name else "validation/"
    return {prefix + figure: value for figure, value in figures(loss, tokens, source_bytes).items()}


def validation_losses(record: Mapping[str, float]) -> dict[str, float]:
    """The losses of a report by their sets' names, in the order reported; empty where nothing was validated."""
    parts = {key: key.split("/") for key in record}
    return {
        "/".join(part[1:-1]): record[key]
        for key, part in parts.items()
        if part[0] == "validation" and part[-1] == "loss"
    }

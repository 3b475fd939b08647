"""The README.md of an exported model: what it is, its sizes and losses, and how it is loaded."""

from pathlib import Path
from typing import Any

from overtok_megatron.checkpoint.store import Manifest
from overtok_megatron.config.counts import parameter_counts, table_shape
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.interchange.families import releases_of
from overtok_megatron.loss_metrics import validation_losses
from overtok_megatron.run_folder import RunFolder

_PLAIN = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""
_OVER_ENCODED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# table_storage: "device" beside the model, "cpu" in host memory, "mapped" left on disk
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True, table_storage="device")
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
"""


def model_card(
    config: RunConfig, manifest: Manifest, source: Path, *, size: int, values: dict[str, Any], notes: list[str]
) -> str:
    """The card as Markdown. size: bytes of all tensors; values: of config.json; notes: what else a reader must know."""
    count = parameter_counts(config)
    over = config.over_encoding
    spans = releases_of(config.model, fused=over.enabled)
    releases = ", or ".join(f"{first} or later, below {end}" for first, end in spans)
    rows = [
        ("architecture", values["architectures"][0]),
        ("parameters, dense", f"{count.dense:,}"),
        ("parameters, n-gram tables", f"{count.tables:,}"),
        ("vocabulary", f"{config.model.vocab_size:,}"),
        ("context", f"{config.data.seq_length:,} tokens"),
        ("transformers", f"{releases}; other releases may compute something else"),
        ("weights", f"{values['dtype']}, {size:,} bytes in all"),
        ("training steps", f"{manifest.step:,} ({manifest.consumed_samples * config.data.seq_length:,} tokens)"),
    ]
    if over.enabled:
        _, total, width = table_shape(config)
        longest = max(over.ngram_order, *(max(group.orders) for group in over.added), 0)
        rows.insert(3, ("n-gram tables", f"{total:,} rows of {width}, n-grams up to {longest}, {over.row_dtype}"))
    for name, loss in reported_losses(source, manifest.step).items():
        rows.append((f"validation loss, {name}" if name else "validation loss", f"{loss:.4f} nats a token"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    kind = "An over-encoded language model: its input vocabulary has hashed n-grams beside tokens (arXiv 2501.16975)."
    code = (_OVER_ENCODED if over.enabled else _PLAIN).format(folder="FOLDER")
    notes_text = "".join(f"\nNote: {note}.\n" for note in notes)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# Model\n\n"
        f"{kind if over.enabled else 'A language model'} {'' if over.enabled else 'trained with overtok_megatron.'}\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n```python\n{code}```\n{notes_text}"
    )


def reported_losses(checkpoint: Path, step: int) -> dict[str, float]:
    """The validation losses by set that the run reported at a checkpoint's step, where its metrics are beside it."""
    try:
        found = [record for record in RunFolder(checkpoint.parent.parent).read_metrics() if record.get("step") == step]
        return {name: float(loss) for record in found for name, loss in validation_losses(record).items()}
    except (OSError, ValueError, TypeError):
        return {}

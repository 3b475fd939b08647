"""Checks that a converted model computes what its source computes: logits of both on real text, in float32."""

import codecs
import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import read_text
from overtok_megatron.inference.loading import TrainedModel, load_trained
from overtok_megatron.interchange import exporting
from overtok_megatron.interchange.exporting import MODELING
from overtok_megatron.interchange.families import require_transformers

_TOKENS = 256  # of the text
_ROUNDING = 1e-5  # of float32 operations in another order, relative to the largest logit
_HALF_ROUNDING = 5e-2  # the same where weights were rounded to sixteen bits


@dataclass(frozen=True)
class Comparison:
    """Largest difference of two logits, largest logit, number of tokens compared, and largest allowed difference."""

    difference: float
    largest: float
    tokens: int
    bound: float

    @property
    def equal(self) -> bool:
        return self.difference <= self.bound

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.difference:.2e} over {self.tokens} tokens "
            f"(largest logit {self.largest:.3g}, bound {self.bound:.2e})"
        )


def hugging_face_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [1, s, V] float32 of the model in a Hugging Face folder; tokens [1, s].

    The only code in the folder that is executed is this package's modelling file. Raises CheckpointError where it is another.
    """
    modeling = folder / MODELING
    if modeling.is_file() and modeling.read_bytes() != Path(exporting.__file__).with_name(MODELING).read_bytes():
        raise CheckpointError(
            f"{modeling}: not the one of this version, and nobody else's code is executed; --no-check converts without it"
        )
    transformers = require_transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    more: dict[str, Any] = {}
    marked = (folder / "config.json").read_bytes().startswith(codecs.BOM_UTF8)
    if marked and not modeling.is_file():  # transformers does not read a file with a byte-order mark
        raw = json.loads(read_text(folder / "config.json"))
        more["config"] = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    with contextlib.redirect_stdout(io.StringIO()):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder.resolve()),
            trust_remote_code=modeling.is_file(),
            dtype=torch.float32,
            local_files_only=True,
            **more,
        )
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def our_logits(trained: TrainedModel, tokens: Tensor) -> Tensor:
    """Logits [1, s, V] float32 of a trained model; tokens [1, s]."""
    fetched = trained.fetch_rows(tokens)
    return trained.model.logits(tokens, fetched).float()


def compare(run: Path, folder: Path, text: str, *, rounded: bool = False, tokenizer: Path | None = None) -> Comparison:
    """Compare the logits of both models on the beginning of a text.

    rounded: whether the conversion rounded the weights. tokenizer: as `load_trained`'s.
    Raises CheckpointError where the logits have different shapes, or the text is empty.
    """
    trained = load_trained(run, torch.device("cpu"), precision="fp32", tokenizer_path=tokenizer)
    tokens = torch.tensor([trained.tokenizer.encode(text)[: min(_TOKENS, trained.config.data.seq_length)]])
    if tokens.numel() == 0:
        raise CheckpointError("the text to compare on is empty; name another with --text")
    ours, theirs = our_logits(trained, tokens), hugging_face_logits(folder, tokens)
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{folder}: gives logits of shape {list(theirs.shape)}, {run} gives {list(ours.shape)}")
    largest = ours.abs().max().item()
    bound = (_HALF_ROUNDING if rounded else _ROUNDING) * max(1.0, largest)
    return Comparison((ours - theirs).abs().max().item(), largest, tokens.numel(), bound)

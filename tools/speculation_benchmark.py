"""`benchmark.py speculative`: decoding by drafts of a trained model's heads, beside plain decoding of the same model."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measuring import alternate

from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.errors import InputError
from overtok_megatron.inference.generation import generate_tokens
from overtok_megatron.inference.head_proposers import MultiTokenProposer, OverDecodingProposer
from overtok_megatron.inference.loading import TrainedModel, load_trained
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.inference.speculation import Speculation


def _speculations(trained: TrainedModel) -> dict[str, Speculation]:
    """Each kind of heads that the model has, by itself."""
    made: dict[str, Speculation] = {}
    if trained.model.over_decoding is not None:
        made["over_decoding"] = Speculation(lambda batch, columns: OverDecodingProposer(trained, batch))
    if trained.model.multi_token is not None:
        made["multi_token"] = Speculation(partial(MultiTokenProposer, trained))
    if not made:
        raise InputError("speculative: this run has no heads that draft tokens; name one that was trained with them")
    return made


class _Decoding:
    """Generates the same texts at each call, and counts tokens."""

    def __init__(
        self, trained: TrainedModel, prompts: list[list[int]], sampling: Sampling, speculation: Speculation | None
    ) -> None:
        self._generate: Callable[[], list[list[int]]] = partial(
            generate_tokens, trained, prompts, sampling, speculation
        )
        self.tokens = 0

    def __call__(self) -> None:
        self.tokens = sum(len(text) for text in self._generate())


def speculative(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and accepted tokens per pass; a pass gives one more. tokens_per_pass is the limit of the speed-up:
    drafts would have to cost nothing, and a pass over several positions no more than one over a single position."""
    trained = load_trained(Path(options.run_folder), options.device)
    dataset, result = IndexedDataset(options.data), dict[str, Any]()
    sampling = Sampling(max_new_tokens=options.new, temperature=options.temperature)
    for batch in options.batches:
        starts = [index * (dataset.num_tokens - options.prompt) // batch for index in range(batch)]
        prompts = [dataset.tokens(start, options.prompt).tolist() for start in starts]
        speculations = _speculations(trained)
        contenders = {"plain": _Decoding(trained, prompts, sampling, None)} | {
            name: _Decoding(trained, prompts, sampling, one) for name, one in speculations.items()
        }
        seconds = alternate(contenders, options.rounds, options.device)
        speeds = {name: contenders[name].tokens / time for name, time in seconds.items()}
        result[f"batch {batch}"] = {"plain": {"tokens_per_second": speeds["plain"]}} | {
            name: {
                "tokens_per_second": speeds[name],
                "speed_up": speeds[name] / speeds["plain"],
                "tokens_per_pass": 1 + one.counts.accepted_per_pass,
                "accepted_per_pass": one.counts.accepted_per_pass,
                "accepted_shares": one.counts.shares,
            }
            for name, one in speculations.items()
        }
    return result

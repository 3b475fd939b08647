"""A trained model as lm-eval sees models: `lm_eval --model overtok --model_args run=RUN,storage=mapped`.

Tokenization, truncation and windows are those of lm-eval's adapter for Hugging Face models, so that a model and its export
get the same scores. Not here: chat templates (these are base models) and several processes.

Shapes: b batch, s sequence, c tokens of a continuation, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from overtok_megatron.errors import InputError
from overtok_megatron.evaluation.perplexity import BATCH_TOKENS
from overtok_megatron.evaluation.registration import NAME
from overtok_megatron.inference.generation import generate_texts
from overtok_megatron.inference.loading import STORAGES, TrainedModel, load_trained
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.parallel.devices import default_device, named_device, num_accelerators

log = logging.getLogger(__name__)

_MAX_GENERATED = 256  # lm-eval's default for tasks that name no limit

Scored = tuple[float, bool]
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation)


@register_model(NAME)
class OvertokLM(TemplateLM):
    """Scores and continues texts with the run's latest checkpoint, in contexts of at most the trained length."""

    def __init__(
        self,
        *,
        run: str | None = None,
        storage: str = "device",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trained: TrainedModel | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """run: a run's output folder or a checkpoint. tokenizer: the run's, where it is not found otherwise. trained: a
        model that is already loaded, instead of `run`."""
        super().__init__()
        if trained is None:
            trained = load_for_evaluation(run, storage, device, tokenizer)
        self.trained = trained
        self.max_length = trained.config.data.seq_length
        self._device = trained.device
        self.batch_size = batch_size  # lm-eval reads it
        self._max_requests = max_batch_size  # in a batch
        self._batch_tokens: int | None = BATCH_TOKENS  # at most in a batch
        if not str(batch_size).startswith("auto"):
            self._batch_tokens = None
            self._max_requests = min(int(batch_size), max_batch_size or int(batch_size))

    @property
    def eot_token_id(self) -> int:
        return self.trained.tokenizer.eod_id

    @property
    def tokenizer_name(self) -> str:
        return self.trained.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.trained.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[Scored]:
        """For each request: the log-likelihood of its continuation, and whether greedy decoding would give it."""
        sizes = [len(context) + len(continuation) for _, context, continuation in requests]
        if cut := sum(size > self.max_length + 1 for size in sizes):
            log.warning(
                "%d of %d requests are longer than the trained context of %d tokens: cut on the left",
                *(cut, len(requests), self.max_length),
            )
        longest_first = sorted(range(len(requests)), key=lambda index: -sizes[index])
        results: dict[int, Scored] = {}
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            for chosen in self._batches(longest_first, [min(size, self.max_length) for size in sizes]):
                for index, scored in zip(chosen, self._score([requests[index] for index in chosen]), strict=True):
                    results[index] = scored
                    if requests[index][0] is not None:  # windows of a longer text have no texts of their own
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], scored)
                bar.update(len(chosen))
        return [results[index] for index in range(len(requests))]

    def _batches(self, indices: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
        """`indices` cut into batches, each with as many requests as allowed, or as many tokens after padding; at least one."""
        batch: list[int] = []
        longest = 0
        for index in indices:
            longest = max(longest, sizes[index])
            full = self._batch_tokens is not None and longest * (len(batch) + 1) > self._batch_tokens
            if batch and (full or len(batch) == self._max_requests):
                yield batch
                batch, longest = [], sizes[index]
            batch.append(index)
        if batch:
            yield batch

    def _score(self, requests: Sequence[Request]) -> list[Scored]:
        inputs = []
        for _, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens; scored are 1 to {self.max_length}, the trained context"
                )
            inputs.append((context + continuation)[-(self.max_length + 1) : -1])  # the last token is only predicted
        tokens = torch.full(
            (len(inputs), max(map(len, inputs))), self.eot_token_id
        )  # [b, s]; causal: padding comes after
        for row, own in enumerate(inputs):
            tokens[row, : len(own)] = torch.tensor(own)
        tokens = tokens.to(self._device)
        fetched = self.trained.fetch_rows(tokens)
        hidden = self.trained.model.hidden(tokens, fetched)[0]  # [b, s, d]
        return [
            self._score_continuation(hidden[row, len(own) - len(continuation) : len(own)], continuation)
            for row, (own, (*_, continuation)) in enumerate(zip(inputs, requests, strict=True))
        ]

    def _score_continuation(self, hidden: Tensor, continuation: list[int]) -> Scored:
        """hidden [c, d]: at the positions that predict the continuation."""
        logits = self.trained.model.head.logits(hidden.unsqueeze(0))[0].float().log_softmax(dim=-1)  # [c, V]
        wanted = torch.tensor(continuation, device=hidden.device)
        greedy = bool((logits.argmax(dim=-1) == wanted).all())
        return float(logits.gather(1, wanted.unsqueeze(1)).sum()), greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token scored once, in windows of the trained context."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of a request's stop strings (left out), or the end of the document."""
        prompts = self.trained.tokenizer.encode_batch([request.args[0] for request in requests])
        by_settings = sorted(range(len(requests)), key=lambda index: str(requests[index].args[1]))
        results: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm or None) as bar:
            for _, group in groupby(by_settings, key=lambda index: str(requests[index].args[1])):
                same = sorted(group, key=lambda index: len(prompts[index]))
                settings = dict(normalize_gen_kwargs(requests[same[0]].args[1], _MAX_GENERATED))
                sizes = [min(len(prompt) + settings["max_gen_toks"], self.max_length) for prompt in prompts]
                for batch in self._batches(same, sizes):
                    texts = self._continue([prompts[index] for index in batch], settings)
                    for index, text in zip(batch, texts, strict=True):
                        results[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return [results[index] for index in range(len(requests))]

    def _continue(self, contexts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """settings: as lm-eval normalizes them."""
        wanted = dict(settings)
        stops = [stop for stop in wanted.pop("until") if stop]
        sampling = Sampling(
            max_new_tokens=wanted.pop("max_gen_toks"),
            temperature=wanted.pop("temperature", 1.0 if wanted.get("do_sample") else 0.0),
            top_k=wanted.pop("top_k", 0),
            top_p=wanted.pop("top_p", 1.0),
        )
        wanted.pop("do_sample", None)
        if wanted:
            raise InputError(
                f"generation setting {sorted(wanted)[0]}: not known here; leave it out of generation_kwargs"
            )
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks {sampling.max_new_tokens}: leaves no room for a prompt in the context of {self.max_length} "
                "tokens; ask for fewer by --gen_kwargs max_gen_toks=N"
            )
        prompts = [tokens[-room:] or [self.eot_token_id] for tokens in contexts]
        # decoded without the prompt, as lm-eval's own adapter does, and so without a space that begins the text
        return generate_texts(self.trained, prompts, sampling, stops, alone=True)


def load_for_evaluation(
    run: str | None, storage: str, device: str | None, tokenizer: str | None = None
) -> TrainedModel:
    """The model that --model_args name. Raises InputError where they name none; else as `load_trained`."""
    if run is None:
        raise InputError("model_args: name a run's output folder, as in --model_args run=runs/mine")
    if storage not in STORAGES:
        raise InputError(f"model_args: storage={storage}; must be one of {', '.join(STORAGES)}")
    if device is not None and device.startswith("cuda") and num_accelerators() == 0:
        device = None  # lm-eval asks for cuda:0 whatever there is
    chosen = default_device() if device is None else named_device(device, "model_args: device")
    known_storage = next(known for known in STORAGES if known == storage)
    path = None if tokenizer is None else Path(str(tokenizer))
    return load_trained(Path(str(run)), chosen, known_storage, tokenizer_path=path)

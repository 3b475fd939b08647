"""From prompts to texts, all at once or as the tokens come.

Shapes: b batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch

from overtok_megatron.errors import InputError
from overtok_megatron.inference.decoder import IncrementalDecoder, pad_left
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling, choose
from overtok_megatron.inference.stream import TextStream, continuation


def generate_tokens(trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continuations of tokenized prompts, each up to its end-of-document token (left out) or max_new_tokens.

    Raises InputError for an empty prompt, or one that with max_new_tokens does not fit the context that was trained.
    """
    if not prompts:
        return []
    results: list[list[int]] = [[] for _ in prompts]
    for chosen in stream_tokens(trained, prompts, sampling):
        for result, token in zip(results, chosen, strict=True):
            if token is not None:
                result.append(token)
    return results


def _check_room(trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    context = trained.config.data.seq_length
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {index + 1}: empty; give at least one character")
        if len(prompt) + sampling.max_new_tokens > context:
            raise InputError(
                f"prompt {index + 1}: {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} pass the "
                f"context of {context} tokens; shorten it, or ask for at most {max(0, context - len(prompt))}"
            )


def stream_tokens(
    trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[list[int | None]]:
    """The next token of every prompt, step by step; None from its end-of-document token on.

    Every prompt has a random stream of its own, made from the seed: its text does not depend on the other prompts.
    Raises as `generate_tokens`, at the first step.
    """
    _check_room(trained, prompts, sampling)
    device = trained.device
    tokens = pad_left(prompts, device)
    decoder = IncrementalDecoder(trained, len(prompts), tokens.shape[1] + sampling.max_new_tokens)
    generators = [torch.Generator(device=device).manual_seed(sampling.seed) for _ in prompts]
    eod = trained.tokenizer.eod_id
    running = [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        logits = decoder.feed(tokens, last=True)[:, -1].float()  # [b, V]
        chosen = torch.cat(
            [choose(row[None], sampling, generator) for row, generator in zip(logits, generators, strict=True)]
        )
        values = chosen.tolist()
        running = [runs and token != eod for runs, token in zip(running, values, strict=True)]
        if not any(running):
            return
        yield [token if runs else None for token, runs in zip(values, running, strict=True)]
        tokens = chosen.unsqueeze(1)


def generate_texts(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[str] = (),
    *,
    alone: bool = False,
) -> list[str]:
    """Continuations of tokenized prompts as text, up to the first stop string (left out); else as `generate_tokens`.

    The text is what the tokens spell after their prompt; alone: what they spell without it.
    """
    tokenizer = trained.tokenizer
    contexts: list[Sequence[int]] = [() if alone else prompt for prompt in prompts]
    if not stops:  # then it is enough to decode all tokens at once
        generated = generate_tokens(trained, prompts, sampling)
        return [continuation(tokenizer, before, tokens) for before, tokens in zip(contexts, generated, strict=True)]
    if not prompts:
        return []
    streams = [TextStream(tokenizer, stops, before) for before in contexts]
    for chosen in stream_tokens(trained, prompts, sampling):
        for stream, token in zip(streams, chosen, strict=True):
            if token is not None and not stream.stopped:
                stream.add(token)
        if all(stream.stopped or token is None for stream, token in zip(streams, chosen, strict=True)):
            break
    for stream in streams:
        stream.finish()
    return [stream.text for stream in streams]


def stream_texts(trained: TrainedModel, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The continuation of one text, in pieces as they become certain; joined they are what `generate` gives."""
    tokens = trained.tokenizer.encode(prompt)
    stream = TextStream(trained.tokenizer, prompt=tokens)
    for (token,) in stream_tokens(trained, [tokens], sampling):
        if token is not None:
            yield stream.add(token)
    yield stream.finish()


def generate(trained: TrainedModel, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Continuations of texts; see `generate_tokens`."""
    return generate_texts(trained, trained.tokenizer.encode_batch(list(prompts)), sampling)

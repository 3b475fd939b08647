"""From prompts to texts, all at once or as the tokens come.

Shapes: b batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence

from overtok_megatron.errors import InputError
from overtok_megatron.inference.decoder import IncrementalDecoder, pad_left
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Draw, Sampling, choose_each
from overtok_megatron.inference.speculation import Speculation, SpeculativeDecoder
from overtok_megatron.inference.stream import TextStream, continuation


def generate_tokens(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    speculation: Speculation | None = None,
) -> list[list[int]]:
    """Continuations of tokenized prompts, each up to its end-of-document token (left out) or max_new_tokens.

    speculation: makes drafts that the model verifies, here and below; None = plain decoding, one token per pass.
    Raises InputError for an empty prompt, or one that with max_new_tokens does not fit the context that was trained.
    """
    if not prompts:
        return []
    results: list[list[int]] = [[] for _ in prompts]
    for runs in stream_tokens(trained, prompts, sampling, speculation):
        for result, tokens in zip(results, runs, strict=True):
            result += tokens
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
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    speculation: Speculation | None = None,
) -> Iterator[list[list[int]]]:
    """The next tokens of every prompt, pass by pass: none from its end-of-document token on, else one or more.

    Every prompt has a random stream of its own, made from the seed: its text does not depend on the other prompts.
    Raises as `generate_tokens`, at the first pass.
    """
    _check_room(trained, prompts, sampling)
    draws = [Draw.begin(sampling, trained.device) for _ in prompts]
    if speculation is None:
        return _stream_plain(trained, prompts, draws)
    return _stream_speculative(trained, prompts, draws, speculation)


def _stream_plain(
    trained: TrainedModel, prompts: Sequence[Sequence[int]], draws: Sequence[Draw]
) -> Iterator[list[list[int]]]:
    """As `stream_tokens`; draws: of every prompt, with one number of tokens for all."""
    tokens, max_new_tokens = pad_left(prompts, trained.device), draws[0].sampling.max_new_tokens
    decoder = IncrementalDecoder(trained, len(prompts), tokens.shape[1] + max_new_tokens)
    running = [True] * len(prompts)
    for _ in range(max_new_tokens):
        chosen = choose_each(decoder.feed(tokens, last=True)[:, -1].float(), draws)  # [b]
        values = chosen.tolist()
        running = [runs and token != trained.tokenizer.eod_id for runs, token in zip(running, values, strict=True)]
        if not any(running):
            return
        yield [[token] if runs else [] for token, runs in zip(values, running, strict=True)]
        tokens = chosen.unsqueeze(1)


def _stream_speculative(
    trained: TrainedModel, prompts: Sequence[Sequence[int]], draws: Sequence[Draw], speculation: Speculation
) -> Iterator[list[list[int]]]:
    """As `_stream_plain`. A prompt whose text has ended leaves the batch."""
    tokens, max_new_tokens = pad_left(prompts, trained.device), draws[0].sampling.max_new_tokens
    decoder = SpeculativeDecoder(trained, len(prompts), tokens.shape[1] + max_new_tokens, speculation)
    prompt_of_row = list(range(len(prompts)))
    left = [max_new_tokens] * len(prompts)
    first = choose_each(decoder.feed(tokens, last=True)[:, -1].float(), draws)  # [b]
    runs = [[token] for token in first.tolist()]  # in row order
    while True:
        step: list[list[int]] = [[] for _ in prompts]
        pending = [run[-1] for run in runs]
        for row in range(len(runs) - 1, -1, -1):  # from the last row, which takes over the row of one that leaves
            prompt, run = prompt_of_row[row], runs[row]
            if ended := trained.tokenizer.eod_id in run:
                run = run[: run.index(trained.tokenizer.eod_id)]
            step[prompt] = run[: left[prompt]]
            left[prompt] -= len(step[prompt])
            if ended or not left[prompt]:
                decoder.leave(row)
                for rows in (prompt_of_row, pending):
                    rows[row] = rows[-1]
                    rows.pop()
        if any(step):
            yield step
        if not pending:
            return
        advanced = decoder.advance(pending, [draws[prompt] for prompt in prompt_of_row])
        runs = [run.tokens for run in advanced]


def generate_texts(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[str] = (),
    *,
    alone: bool = False,
    speculation: Speculation | None = None,
) -> list[str]:
    """Continuations of tokenized prompts as text, up to the first stop string (left out); else as `generate_tokens`.

    The text is what the tokens spell after their prompt; alone: what they spell without it.
    """
    tokenizer = trained.tokenizer
    contexts: list[Sequence[int]] = [() if alone else prompt for prompt in prompts]
    if not stops:  # then it is enough to decode all tokens at once
        generated = generate_tokens(trained, prompts, sampling, speculation)
        return [continuation(tokenizer, before, tokens) for before, tokens in zip(contexts, generated, strict=True)]
    if not prompts:
        return []
    streams = [TextStream(tokenizer, stops, before) for before in contexts]
    for runs in stream_tokens(trained, prompts, sampling, speculation):
        for stream, tokens in zip(streams, runs, strict=True):
            for token in tokens:
                if not stream.stopped:
                    stream.add(token)
        if all(stream.stopped or not tokens for stream, tokens in zip(streams, runs, strict=True)):
            break
    for stream in streams:
        stream.finish()
    return [stream.text for stream in streams]


def stream_texts(
    trained: TrainedModel, prompt: str, sampling: Sampling, speculation: Speculation | None = None
) -> Iterator[str]:
    """The continuation of one text, in pieces as they become certain; joined they are what `generate` gives."""
    tokens = trained.tokenizer.encode(prompt)
    stream = TextStream(trained.tokenizer, prompt=tokens)
    for (run,) in stream_tokens(trained, [tokens], sampling, speculation):
        for token in run:
            yield stream.add(token)
    yield stream.finish()


def generate(
    trained: TrainedModel, prompts: Sequence[str], sampling: Sampling, speculation: Speculation | None = None
) -> list[str]:
    """Continuations of texts; see `generate_tokens`."""
    encoded = trained.tokenizer.encode_batch(list(prompts))
    return generate_texts(trained, encoded, sampling, speculation=speculation)

"""Sequences that join and leave a batch get the logits that they would get alone."""

import random

import pytest
import torch

from overtok_megatron.inference import continuous_batch
from overtok_megatron.inference.continuous_batch import ContinuousBatch
from overtok_megatron.inference.decoder import IncrementalDecoder
from overtok_megatron.inference.loading import TrainedModel
from support.small_models import CONTEXT, VOCAB, full_logits


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_joining_and_leaving(
    small_model: TrainedModel, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(continuous_batch, "_SLACK", 3)  # so that the cache is moved often
    draw = random.Random(seed)
    batch, sequences = ContinuousBatch(small_model, 4), list[list[int]]()
    joined, moves = 0, set[bool]()
    move = batch.cache.move
    monkeypatch.setattr(batch.cache, "move", lambda rows, columns: (moves.add(columns > 0), move(rows, columns)))

    def check(sequence: list[int], logits: torch.Tensor) -> None:
        own = full_logits(small_model, torch.tensor([sequence]))[0, -1]
        torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5 * own.abs().max().item())

    for _ in range(150):
        ended = [row for row, sequence in enumerate(sequences) if len(sequence) == CONTEXT or draw.random() < 0.04]
        for row in reversed(ended):
            batch.leave(row)
            sequences[row] = sequences[-1]
            sequences.pop()
        if len(sequences) < 4 and draw.random() < 0.3:
            prompt = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 2, 9, 30, CONTEXT - 1]))]
            sequences.append(prompt)
            joined += 1
            own, begin = IncrementalDecoder(small_model, 1, len(prompt) + draw.choice([0, 5])), 0
            while begin < len(prompt):
                count = draw.choice([1, 4, CONTEXT])
                logits = own.feed(torch.tensor([prompt[begin : begin + count]]), last=True)
                begin += count
            batch.join(own)
            check(prompt, logits[0, -1])
        if sequences:
            tokens = [draw.choice([0, draw.randrange(VOCAB)]) for _ in sequences]
            logits = batch.step(tokens)
            for row, token in enumerate(tokens):
                sequences[row] = [*sequences[row], token]
                check(sequences[row], logits[row])
        assert len(batch) == len(sequences)
    assert joined > 8
    assert moves == {True, False}  # to the right for long prompts, to the left behind long sequences that left

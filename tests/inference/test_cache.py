"""Sequences of different lengths in one cache: cropped, copied and moved, each gets the logits that it would get alone."""

import random

import pytest
import torch

from overtok_megatron.inference.decoder import IncrementalDecoder, pad_left
from overtok_megatron.inference.loading import TrainedModel
from support.small_models import CONTEXT, VOCAB, full_logits

CPU = torch.device("cpu")


def draw_tokens(draw: random.Random, count: int) -> list[int]:
    """With ends of documents among them."""
    return [draw.choice([0, *range(VOCAB)]) for _ in range(count)]


def check_last(trained: TrainedModel, sequences: list[list[int]], logits: torch.Tensor) -> None:
    """The logits [b, s, V] of the last s tokens of each sequence are those of a full forward pass over it."""
    for row, sequence in enumerate(sequences):
        own = full_logits(trained, torch.tensor([sequence]))[0]
        known = min(len(sequence), logits.shape[1])
        torch.testing.assert_close(logits[row, -known:], own[-known:], rtol=1e-5, atol=1e-5 * own.abs().max().item())


@pytest.mark.parametrize("seed", range(3))
def test_cropped_tokens_were_never_fed(small_model: TrainedModel, seed: int) -> None:
    """One sequence, cropped and continued: bit for bit the logits of a decoder that was fed only what stayed."""
    draw = random.Random(seed)
    kept, dropped, more = (draw_tokens(draw, draw.randint(*bounds)) for bounds in ((1, 15), (1, 9), (1, 6)))
    cropped, afresh = (IncrementalDecoder(small_model, 1, CONTEXT) for _ in range(2))
    for decoder in (cropped, afresh):
        decoder.feed(torch.tensor([kept]))
    cropped.feed(torch.tensor([dropped]))
    cropped.crop([len(kept)])
    assert cropped.cache.lengths == [len(kept)]
    for token in more:
        assert torch.equal(cropped.feed(torch.tensor([[token]])), afresh.feed(torch.tensor([[token]])))


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_feeding_cropping_copying_and_moving(small_model: TrainedModel, seed: int) -> None:
    """A padded batch whose sequences come to end at different columns; also down to no tokens, and a row from another cache."""
    draw = random.Random(seed)
    sequences = [draw_tokens(draw, draw.randint(1, 12)) for _ in range(3)]
    decoder = IncrementalDecoder(small_model, 3, 150)
    check_last(small_model, sequences, decoder.feed(pad_left(sequences, CPU)))
    uneven = 0
    for _ in range(25):
        action = draw.choice(["crop", "crop", "copy", "join", "move"])
        if action == "crop":
            lengths = [draw.randint(max(0, len(sequence) - 4), len(sequence)) for sequence in sequences]
            decoder.crop(lengths)
            sequences = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
        elif action == "copy":
            source, target = draw.sample(range(3), 2)
            decoder.cache.copy_row(source, target)
            sequences[target] = list(sequences[source])
        elif action == "join":
            sequences[1] = draw_tokens(draw, draw.randint(1, 9))
            own = IncrementalDecoder(small_model, 1, 9)
            own.feed(torch.tensor([sequences[1]]))
            end = max(len(sequences[1]), *decoder.cache.ends) if draw.random() < 0.5 else None
            decoder.cache.copy_row(0, 1, own.cache, end=end)
        else:
            starts = [end - size for end, size in zip(decoder.cache.ends, decoder.cache.lengths, strict=True)]
            decoder.cache.move(3, draw.randint(-min(starts), 3))
        assert decoder.cache.lengths == [len(sequence) for sequence in sequences]
        new = [draw_tokens(draw, draw.choice([1, 1, 3]))] * 3
        logits = decoder.feed(torch.tensor(new))
        sequences = [[*sequence, *tokens] for sequence, tokens in zip(sequences, new, strict=True)]
        uneven += len(set(decoder.cache.ends)) > 1
        check_last(small_model, sequences, logits)
    assert uneven > 5


def test_a_history_is_the_tail_of_the_tokens(small_model: TrainedModel) -> None:
    decoder = IncrementalDecoder(small_model, 2, 9)
    decoder.feed(pad_left([[5, 6, 7], [8]], CPU))
    assert decoder.cache.history(2, 2).tolist() == [[6, 7], [-1, 8]]
    assert decoder.cache.history(2, 4).tolist() == [[-1, 5, 6, 7], [-1, -1, -1, 8]]
    decoder.crop([2, 1])
    assert decoder.cache.history(2, 2).tolist() == [[5, 6], [-1, 8]]
    assert decoder.cache.history(2, 4).tolist() == [[-1, -1, 5, 6], [-1, -1, -1, 8]]
    assert decoder.cache.history(1, 1).tolist() == [[6]]

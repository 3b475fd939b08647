"""Exact speculative decoding: a proposer drafts k tokens of each sequence, and one forward pass of the model verifies them all.

The texts are those of plain decoding: greedy ones token for token, sampled ones in distribution (acceptance.py). What the
model was fed beyond the accepted drafts is cropped, for each sequence at a length of its own: keys, values, and the tokens
that n-grams reach back to; the proposer rolls back what it holds.

Token for token means: in exact arithmetic. The logits of a position are compared by argmax alone, and a pass over k + 1
positions sums in another order than one over a single position, as a batch of several sequences does beside one sequence.
In float32 such logits differ in the last bits, so another token is chosen only where two of them are closer than this.

Shapes: b sequences, s tokens of a call, k drafts, d hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from overtok_megatron.inference.acceptance import AcceptanceCounts, DraftedPass
from overtok_megatron.inference.decoder import IncrementalDecoder, Run
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Draw
from overtok_megatron.parallel.uploading import moved


class Proposer(Protocol):
    """Drafts tokens of several sequences. Its rows are those of the decoder; where a call brings fewer, the first are meant.

    hidden [b, s, d] are always the model's last hidden states after the final norm, at the positions of tokens.
    """

    @property
    def num_drafts(self) -> int:
        """k, at least 1."""

    def observe(self, tokens: Tensor, hidden: Tensor) -> None:
        """The model was fed tokens int64 [b, s] of prompts (MISSING = padding, only before a sequence's first token)."""

    def propose(self, pending: Tensor, draft: Callable[[Tensor], Tensor]) -> Tensor:
        """Drafts int64 [b, k] after the tokens fed so far and pending int64 [b], which was chosen but not fed yet.

        draft: to be called k times, with the logits [b, V] float32 of each draft in turn; it returns the draft, [b].
        """

    def keep(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> None:
        """After `propose`: the model was fed tokens [b, k + 1], pending and drafts; the first counts[row] of them stay."""

    def copy_row(self, source_row: int, target_row: int, source: Self | None = None) -> None:
        """Put the state of one sequence in place of another's. source: the proposer that has it, None = this one."""

    def clear_row(self, row: int) -> None:
        """Forget one sequence."""


@dataclass(frozen=True)
class Speculation:
    """How drafts are made. make_proposer: from the number of sequences and the tokens that each can have.

    counts: of all decoding with this object.
    """

    make_proposer: Callable[[int, int], Proposer]
    counts: AcceptanceCounts = field(default_factory=AcceptanceCounts)


class SpeculativeDecoder(IncrementalDecoder):
    """Sequences that are decoded by drafts; they join and leave as in a `ContinuousBatch`, and end at columns of their own.

    The last token of each sequence is pending: it was chosen, and is fed with the next drafts.
    """

    def __init__(self, trained: TrainedModel, batch: int, columns: int, speculation: Speculation) -> None:
        """columns: tokens that a sequence can have, its padding included; drafts beyond them find room."""
        self.proposer = speculation.make_proposer(batch, columns)
        super().__init__(trained, batch, columns + self.proposer.num_drafts)
        self._speculation = speculation
        self._used = 0  # rows

    def __len__(self) -> int:
        return self._used

    @torch.no_grad()
    def feed(self, tokens: Tensor, *, last: bool = False) -> Tensor:
        """Feed prompts, or parts of them, to the first rows; else as `IncrementalDecoder.feed`."""
        head = self.trained.model.head
        hidden = head.norm(self.hidden(tokens))  # [b, s, d]
        self.proposer.observe(tokens, hidden)
        self._used = len(tokens)
        return head.project(hidden[:, -1:] if last else hidden)

    def join(self, own: IncrementalDecoder) -> None:
        """Add the one sequence that `own`, a `SpeculativeDecoder` too, was fed as the last row."""
        assert isinstance(own, SpeculativeDecoder)
        self.cache.copy_row(0, self._used, own.cache, end=own.cache.lengths[0])
        self.proposer.copy_row(0, self._used, own.proposer)
        self._used += 1

    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self._used -= 1
        if row != self._used:
            self.cache.copy_row(self._used, row)
            self.proposer.copy_row(self._used, row)
        self.cache.clear_row(self._used)
        self.proposer.clear_row(self._used)

    @torch.no_grad()
    def advance(self, pending: Sequence[int], draws: Sequence[Draw]) -> list[Run]:
        """One pass over all rows, in their order: what it adds to each. The last token of each run is then pending."""
        assert len(pending) == len(draws) == self._used > 0
        num_drafts, device = self.proposer.num_drafts, self.trained.device
        choices = DraftedPass(draws, num_drafts, device)
        first = moved(torch.tensor(pending), device)
        drafts = self.proposer.propose(first, choices.draft)  # [b, k]
        fed = torch.cat([first.unsqueeze(1), drafts], dim=1)  # [b, k + 1]
        lengths = self.cache.lengths[: self._used]
        head = self.trained.model.head
        hidden = head.norm(self.hidden(fed))  # [b, k + 1, d]
        logits = head.project(hidden).float()  # [b, k + 1, V]
        accepted, following = choices.accept(logits)
        # The one wait for the device of a pass, as there is one for each token of plain decoding.
        chosen = torch.cat([drafts, following.unsqueeze(1), accepted.unsqueeze(1)], dim=1).tolist()
        numbers = [row[-1] for row in chosen]
        self._speculation.counts.add(numbers, num_drafts)
        counts = [number + 1 for number in numbers]
        self.crop([length + count for length, count in zip(lengths, counts, strict=True)])
        self.proposer.keep(fed, hidden, counts)
        return [
            Run([*row[:number], row[-2]], logits[i])
            for i, (row, number) in enumerate(zip(chosen, numbers, strict=True))
        ]

"""One thread owns the model and decodes all sequences together; the rest of the server only hands it requests.

Nothing here knows HTTP. Prompts are fed in chunks, one prompt after the other, between the decoding steps of the batch: a long
prompt delays each token of the others by one chunk at most. A sequence joins the batch when its prompt is fed, and leaves it
when it ends, is cancelled or runs out of time. Each sequence has a random stream of its own: its text depends on its seed, not
on the other sequences.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from overtok_megatron.errors import OvertokError
from overtok_megatron.inference.continuous_batch import ContinuousBatch
from overtok_megatron.inference.decoder import IncrementalDecoder
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Draw, Sampling, choose_each
from overtok_megatron.inference.speculation import Speculation, SpeculativeDecoder
from overtok_megatron.inference.stream import TextStream
from overtok_megatron.parallel.devices import make_current

log = logging.getLogger(__name__)


class BusyError(OvertokError):
    """More sequences would wait than the server allows."""


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of a token (None for a prompt's first one), and the likeliest tokens at its position, best first.

    They are the model's own, before temperature and truncation. offset: characters of the text before the token.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class TokenDelta:
    """What a step adds to a sequence. tokens: how many were generated. finish: why the sequence ended (stop, length, timeout
    or error), with its last delta; None before."""

    text: str
    scores: list[TokenScore]
    tokens: int
    finish: str | None


@dataclass(kw_only=True)
class SequenceRequest:
    """One sequence to be continued by at most `max_new_tokens` (0: only the scores of its prompt are wanted).

    top_scores: how many likeliest tokens are scored at each position, None = no scores. prompt_scores: whether the prompt's
    tokens are scored, too. deadline: on the monotonic clock. deliver: called on the scheduler's thread with each delta, the
    last one with `finish`. whole_characters: whether the text has all of a character that the prompt begins.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stops: Sequence[str]
    top_scores: int | None
    prompt_scores: bool
    deadline: float
    deliver: Callable[[TokenDelta], None]
    whole_characters: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Sequence:
    """A request that occupies a slot: its prompt is being fed, or it has a row of the batch."""

    def __init__(self, request: SequenceRequest, trained: TrainedModel) -> None:
        self.request = request
        self.stream = TextStream(
            trained.tokenizer, request.stops, request.prompt, whole_characters=request.whole_characters
        )
        self.draw = Draw.begin(request.sampling, trained.device)
        self.num_generated = 0
        self.token = -1  # the last one generated, which the model was not fed yet

    @property
    def given_up(self) -> bool:
        return self.request.cancelled.is_set() or time.monotonic() > self.request.deadline


class _Prefill:
    """A sequence whose prompt is being fed in chunks, by a decoder of its own."""

    def __init__(self, sequence: _Sequence, trained: TrainedModel, speculation: Speculation | None) -> None:
        self.sequence = sequence
        self.scores: list[TokenScore] = []
        self._tokens = torch.tensor([list(sequence.request.prompt)], device=trained.device)  # [1, p]
        self._spelled = TextStream(trained.tokenizer)  # for the offsets of scores
        self._trained, self._speculation = trained, speculation

    @cached_property
    def decoder(self) -> IncrementalDecoder:
        """Made at its first use: only then does the scheduler know whom to tell that memory does not suffice."""
        if self._speculation is None:
            return IncrementalDecoder(self._trained, 1, self._tokens.shape[1])
        return SpeculativeDecoder(self._trained, 1, self._tokens.shape[1], self._speculation)

    @property
    def num_fed(self) -> int:
        return self.decoder.cache.lengths[0]

    @property
    def num_left(self) -> int:
        """Tokens that are still to be fed."""
        return self._tokens.shape[1] - self.num_fed

    def feed(self, count: int) -> Tensor:
        """Feed the next `count` tokens: logits [1, V] float32 of the last of them."""
        begin, scored = self.num_fed, self.sequence.request.prompt_scores
        tokens = self._tokens[:, begin : begin + count]
        logits = self.decoder.feed(tokens, last=not scored)[0].float()  # [1 or count, V]
        if scored:
            self._score(logits, begin)
        return logits[-1:]

    def _score(self, logits: Tensor, begin: int) -> None:
        """Score the tokens that follow those from `begin` on, whose logits are [r, V]. Offsets are within the prompt's text."""
        request = self.sequence.request
        if begin == 0:
            self.scores.append(TokenScore(request.prompt[0], None, [], 0))
            self._spelled.add(request.prompt[0])
        following = request.prompt[begin + 1 : begin + 1 + len(logits)]
        offsets = []
        for token in following:
            offsets.append(self._spelled.length)
            self._spelled.add(token)
        self.scores += _token_scores(logits[: len(following)], following, request.top_scores or 0, offsets)


class BatchScheduler:
    """Start it with `with`; leaving the block ends all sequences and joins the thread.

    max_batch: sequences that are decoded together, the one whose prompt is being fed included. max_waiting: sequences that
    may wait for a slot. prefill_chunk: the most tokens of prompts that are fed between two steps of the batch. speculation:
    makes drafts that a step verifies; None = plain decoding, one token per step.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        max_batch: int,
        max_waiting: int,
        prefill_chunk: int,
        speculation: Speculation | None = None,
    ) -> None:
        self.trained = trained
        self.speculation = speculation
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.prefill_chunk = prefill_chunk
        self._batch = self._empty_batch()
        # These three are changed only by the scheduler's thread and under the lock, because other threads read them; that
        # thread itself reads them without the lock. Others only extend `_waiting`, under the lock as well.
        self._running: list[_Sequence] = []  # in the batch's row order
        self._prefill: _Prefill | None = None
        self._waiting: deque[SequenceRequest] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    def _empty_batch(self) -> ContinuousBatch | SpeculativeDecoder:
        if self.speculation is None:
            return ContinuousBatch(self.trained, self.max_batch)
        return SpeculativeDecoder(self.trained, self.max_batch, self.trained.config.data.seq_length, self.speculation)

    def __enter__(self) -> "BatchScheduler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Sequences (that have a slot, that wait for one)."""
        with self._changed:
            return self._num_slots_used, len(self._waiting)

    @property
    def _num_slots_used(self) -> int:
        return len(self._running) + (self._prefill is not None)

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Take all of `requests`, or raise BusyError and take none."""
        with self._changed:
            self._drop_waiting()  # requests that were given up take no room in the queue
            free = self.max_batch - self._num_slots_used
            if len(self._waiting) + len(requests) > self.max_waiting + free:
                raise BusyError(f"{len(self._waiting)} sequences wait already; try again later")
            self._waiting.extend(requests)
            self._changed.notify()

    def _drop_waiting(self) -> None:
        """Forget waiting requests that were given up or are out of time. The caller holds the lock."""
        now = time.monotonic()
        late = [request for request in self._waiting if request.deadline < now]
        self._waiting = deque(
            request for request in self._waiting if request.deadline >= now and not request.cancelled.is_set()
        )
        for request in late:
            request.deliver(TokenDelta("", [], 0, "timeout"))

    def cancel(self, requests: Sequence[SequenceRequest]) -> None:
        """Nobody waits for these any more: their slots are given to others."""
        for request in requests:
            request.cancelled.set()

    def _work(self) -> None:
        make_current(self.trained.device)  # a new thread starts on device 0
        while True:
            with self._changed:
                while not (self._waiting or self._num_slots_used or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                self._drop_waiting()
            try:
                self._feed_prompts()
                self._step()
            except Exception:  # out of memory, a file that vanished: the requests fail, the server lives
                log.exception("decoding failed; the requests in the batch are given up")
                self._end_all("error")
                self._batch = self._empty_batch()
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            request.deliver(TokenDelta("", [], 0, "error"))
        self._end_all("error")

    def _end_all(self, reason: str) -> None:
        with self._changed:
            ended, self._running = self._running, []
            if self._prefill is not None:
                ended.append(self._prefill.sequence)
                self._prefill = None
        for sequence in ended:
            sequence.request.deliver(TokenDelta(sequence.stream.finish(), [], 0, reason))

    def _feed_prompts(self) -> None:
        """Feed one chunk of prompts; sequences whose prompts are then complete join the batch."""
        left = self.prefill_chunk
        while left and (prefill := self._next_prefill()):
            count = min(left, prefill.num_left)
            left -= count
            logits = prefill.feed(count)
            if not prefill.num_left:
                self._join(prefill, logits)

    def _next_prefill(self) -> _Prefill | None:
        """The prompt that is being fed, or else the first waiting one where a slot is free."""
        if self._prefill is not None and self._prefill.sequence.given_up:
            with self._changed:
                given_up, self._prefill = self._prefill.sequence, None
            given_up.request.deliver(TokenDelta("", [], 0, "timeout"))
        if self._prefill is None and self._num_slots_used < self.max_batch:
            with self._changed:
                if self._waiting:
                    sequence = _Sequence(self._waiting.popleft(), self.trained)
                    self._prefill = _Prefill(sequence, self.trained, self.speculation)
        return self._prefill

    def _join(self, prefill: _Prefill, logits: Tensor) -> None:
        """Give the sequence a row of the batch, and choose its first token from logits [1, V]."""
        sequence = prefill.sequence
        self._batch.join(prefill.decoder)
        with self._changed:
            self._running.append(sequence)
            self._prefill = None
        if sequence.request.max_new_tokens == 0:
            self._leave(len(self._running) - 1, TokenDelta(sequence.stream.finish(), prefill.scores, 0, "length"))
        else:
            token = int(choose_each(logits, [sequence.draw]))
            self._add(len(self._running) - 1, token, logits, prefill.scores)

    def _step(self) -> None:
        """One more token for every sequence of the batch; with drafts one or more."""
        for row in range(len(self._running) - 1, -1, -1):
            sequence = self._running[row]
            if sequence.given_up:
                self._leave(row, TokenDelta(sequence.stream.finish(), [], 0, "timeout"))
        if not self._running:
            return
        pending, draws = zip(*((sequence.token, sequence.draw) for sequence in self._running), strict=True)
        runs = self._batch.advance(pending, draws)
        for row in range(len(runs) - 1, -1, -1):  # from the last row, which takes over the row of one that leaves
            tokens, logits = runs[row]
            for index, token in enumerate(tokens):
                if not self._add(row, token, logits[index : index + 1], []):
                    break

    def _add(self, row: int, token: int, logits: Tensor, scores: list[TokenScore]) -> bool:
        """Add a token, chosen from logits [1, V], to a row and deliver what it adds; False where the row ends and leaves."""
        sequence = self._running[row]
        request = sequence.request
        sequence.token = token
        if token == self.trained.tokenizer.eod_id:
            self._leave(row, TokenDelta(sequence.stream.finish(), scores, 0, "stop"))
            return False
        if request.top_scores is not None:
            offset = sequence.stream.length
            scores = [*scores, *_token_scores(logits, [token], request.top_scores, [offset])]
        text = sequence.stream.add(token)
        sequence.num_generated += 1
        if sequence.stream.stopped:
            self._leave(row, TokenDelta(text, scores, 1, "stop"))
        elif sequence.num_generated == request.max_new_tokens:
            text += sequence.stream.finish()
            self._leave(row, TokenDelta(text, scores, 1, "stop" if sequence.stream.stopped else "length"))
        else:
            request.deliver(TokenDelta(text, scores, 1, None))
            return True
        return False

    def _leave(self, row: int, delta: TokenDelta) -> None:
        sequence = self._running[row]
        self._batch.leave(row)
        with self._changed:
            self._running[row] = self._running[-1]
            self._running.pop()
        sequence.request.deliver(delta)


def _token_scores(logits: Tensor, tokens: Sequence[int], count: int, offsets: Sequence[int]) -> list[TokenScore]:
    """One score for each row of logits [r, V] float32: of its token, and of the `count` likeliest ones."""
    if not tokens:
        return []
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor([list(tokens)], device=logits.device).T)[:, 0].tolist()
    best = logprobs.topk(count, dim=-1)
    tops = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenScore(*parts) for parts in zip(tokens, chosen, tops, offsets, strict=True)]

"""One thread that owns the model and decodes whatever sequences there are together; the rest of the server only asks it.

Knows no HTTP. Prompts are fed in chunks, one prompt after the other, between the steps of the sequences that run: a long prompt
delays each of their tokens by a chunk at most. A sequence joins the batch when its prompt is fed, and leaves it when it ends,
is cancelled or runs out of time. Each has a random stream of its own: what it says depends on its seed, not on others.
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
from overtok_megatron.inference.generation import IncrementalDecoder, Sampling, choose
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.stream import TextStream
from overtok_megatron.parallel.devices import make_current

log = logging.getLogger(__name__)


class BusyError(OvertokError):
    """More sequences wait than the server lets wait."""


@dataclass(frozen=True)
class TokenScore:
    """log-probability of a token (none for a prompt's first) and of the likeliest ones in its place, likeliest first.

    They are the model's own, before temperature and truncation. offset: characters of the text before the token.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class TokenDelta:
    """What a step adds to a sequence. finish: why it ended, with its last piece: stop, length, timeout or error."""

    text: str
    scores: list[TokenScore]
    tokens: int
    finish: str | None


@dataclass
class SequenceRequest:
    """One sequence to be continued by at most `max_new_tokens` (0: only its prompt's scores are wanted).

    whole_characters: whether its text has all of a character that its prompt begins.
    top_scores: how many likeliest tokens are reported at each place; None = no scores. prompt_scores: of the prompt, too.
    deadline: by time.monotonic(). deliver: called on the engine's thread, the last time with a piece that has `finish`.
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


class _Running:
    """A job that has a place: its prompt is being fed, or it is in the batch."""

    def __init__(self, job: SequenceRequest, trained: TrainedModel, device: torch.device) -> None:
        self.job = job
        self.stream = TextStream(trained.tokenizer, job.stops, job.prompt, whole_characters=job.whole_characters)
        self.generator = torch.Generator(device=device).manual_seed(job.sampling.seed)
        self.count = 0
        self.token = -1

    @property
    def given_up(self) -> bool:
        return self.job.cancelled.is_set() or time.monotonic() > self.job.deadline


class _Prompt:
    """A prompt as it is fed in chunks, by a decoder of its own."""

    def __init__(self, one: _Running, trained: TrainedModel, device: torch.device) -> None:
        self.one = one
        self.scores: list[TokenScore] = []
        self._tokens = torch.tensor([list(one.job.prompt)], device=device)  # [1, p]
        self._spelled = TextStream(trained.tokenizer)  # for the offsets of scores
        self._trained = trained

    @cached_property
    def decoder(self) -> IncrementalDecoder:
        """Made when it is first used, by when the engine knows whom to tell that there is no memory for it."""
        return IncrementalDecoder(self._trained, 1, self._tokens.shape[1])

    @property
    def left(self) -> int:
        """Tokens that are still to be fed."""
        return self._tokens.shape[1] - self.decoder.cache.lengths[0]

    def feed(self, count: int) -> Tensor:
        """The next `count` tokens: logits [1, V] float32 of the last of them."""
        begin, scored = self.decoder.cache.lengths[0], self.one.job.prompt_scores
        tokens = self._tokens[:, begin : begin + count]
        logits = self.decoder.feed(tokens, last=not scored)[0].float()  # [1 or count, V]
        if scored:
            self._score(logits, begin)
        return logits[-1:]

    def _score(self, logits: Tensor, begin: int) -> None:
        """Of what follows the tokens from `begin` on: logits [r, V] are theirs. Offsets are within the prompt's text."""
        job = self.one.job
        if begin == 0:
            self.scores.append(TokenScore(job.prompt[0], None, [], 0))
            self._spelled.add(job.prompt[0])
        following = job.prompt[begin + 1 : begin + 1 + len(logits)]
        offsets = []
        for token in following:
            offsets.append(self._spelled.length)
            self._spelled.add(token)
        self.scores += _scores(logits[: len(following)], following, job.top_scores or 0, offsets)


class BatchScheduler:
    """Start it with `with`; leaving ends what runs and joins the thread.

    prefill_chunk: tokens of prompts that are fed at most between two steps of the batch.
    """

    def __init__(self, trained: TrainedModel, *, places: int, max_waiting: int, prefill_chunk: int) -> None:
        self.trained = trained
        self.places = places
        self.max_waiting = max_waiting
        self.prefill_chunk = prefill_chunk
        self._device = trained.device
        self._batch = ContinuousBatch(trained, places)
        # Changed by the engine's thread alone and under the lock, for others read them; that thread reads without it.
        self._running: list[_Running] = []  # in the batch's row order
        self._prompt: _Prompt | None = None  # takes a place, too
        self._waiting: deque[SequenceRequest] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)

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
        """Sequences (that have a place, waiting)."""
        with self._changed:
            return self._taken, len(self._waiting)

    @property
    def _taken(self) -> int:
        return len(self._running) + (self._prompt is not None)

    def submit(self, jobs: Sequence[SequenceRequest]) -> None:
        """Take all of `jobs`, or raise BusyError and take none."""
        with self._changed:
            self._drop_waiting()  # those that were given up hold no place in the queue
            free = self.places - self._taken
            if len(self._waiting) + len(jobs) > self.max_waiting + free:
                raise BusyError(f"{len(self._waiting)} sequences wait already; try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def _drop_waiting(self) -> None:
        """Forget waiting jobs that were given up or are out of time. The caller holds the lock."""
        now = time.monotonic()
        late = [job for job in self._waiting if job.deadline < now]
        self._waiting = deque(job for job in self._waiting if job.deadline >= now and not job.cancelled.is_set())
        for job in late:
            job.deliver(TokenDelta("", [], 0, "timeout"))

    def cancel(self, jobs: Sequence[SequenceRequest]) -> None:
        """Nobody listens any more: give their places to others."""
        for job in jobs:
            job.cancelled.set()

    def _work(self) -> None:
        make_current(self._device)  # a new thread starts on device 0
        while True:
            with self._changed:
                while not (self._waiting or self._taken or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                self._drop_waiting()
            try:
                self._feed()
                self._step()
            except Exception:  # out of memory, a file that vanished: the requests fail, the server lives
                log.exception("decoding failed; the requests in the batch are given up")
                self._end_all("error")
                self._batch = ContinuousBatch(self.trained, self.places)
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.deliver(TokenDelta("", [], 0, "error"))
        self._end_all("error")

    def _end_all(self, reason: str) -> None:
        with self._changed:
            ended, self._running = self._running, []
            if self._prompt is not None:
                ended.append(self._prompt.one)
                self._prompt = None
        for one in ended:
            one.job.deliver(TokenDelta(one.stream.finish(), [], 0, reason))

    def _feed(self) -> None:
        """Feed one chunk of prompts, and let those into the batch that are fed."""
        left = self.prefill_chunk
        while left and (prompt := self._next_prompt()):
            count = min(left, prompt.left)
            left -= count
            logits = prompt.feed(count)
            if not prompt.left:
                self._join(prompt, logits)

    def _next_prompt(self) -> _Prompt | None:
        """The prompt that is being fed, or else the first that waits for a place, where there is one."""
        if self._prompt is not None and self._prompt.one.given_up:
            with self._changed:
                one, self._prompt = self._prompt.one, None
            one.job.deliver(TokenDelta("", [], 0, "timeout"))
        if self._prompt is None and self._taken < self.places:
            with self._changed:
                if self._waiting:
                    one = _Running(self._waiting.popleft(), self.trained, self._device)
                    self._prompt = _Prompt(one, self.trained, self._device)
        return self._prompt

    def _join(self, prompt: _Prompt, logits: Tensor) -> None:
        """Give the sequence a row of the batch, and choose its first token from logits [1, V]."""
        one = prompt.one
        self._batch.join(prompt.decoder)
        with self._changed:
            self._running.append(one)
            self._prompt = None
        if one.job.max_new_tokens == 0:
            self._leave(len(self._running) - 1, TokenDelta(one.stream.finish(), prompt.scores, 0, "length"))
        else:
            self._advance(len(self._running) - 1, logits, prompt.scores)

    def _step(self) -> None:
        """One more token for every sequence of the batch."""
        for row in range(len(self._running) - 1, -1, -1):
            one = self._running[row]
            if one.given_up:
                self._leave(row, TokenDelta(one.stream.finish(), [], 0, "timeout"))
        if not self._running:
            return
        logits = self._batch.step([one.token for one in self._running]).float()  # [k, V]
        for row in range(len(self._running) - 1, -1, -1):  # from the last: one that leaves gives its row to the last
            self._advance(row, logits[row : row + 1], [])

    def _advance(self, row: int, logits: Tensor, scores: list[TokenScore]) -> None:
        """Choose the row's next token from logits [1, V], deliver what it adds, and let the row leave where it ends."""
        one = self._running[row]
        job = one.job
        one.token = int(choose(logits, job.sampling, one.generator))
        if one.token == self.trained.tokenizer.eod_id:
            self._leave(row, TokenDelta(one.stream.finish(), scores, 0, "stop"))
            return
        if job.top_scores is not None:
            offset = one.stream.length
            scores = [*scores, *_scores(logits, [one.token], job.top_scores, [offset])]
        text = one.stream.add(one.token)
        one.count += 1
        if one.stream.stopped:
            self._leave(row, TokenDelta(text, scores, 1, "stop"))
        elif one.count == job.max_new_tokens:
            text += one.stream.finish()
            self._leave(row, TokenDelta(text, scores, 1, "stop" if one.stream.stopped else "length"))
        else:
            job.deliver(TokenDelta(text, scores, 1, None))

    def _leave(self, row: int, piece: TokenDelta) -> None:
        one = self._running[row]
        self._batch.leave(row)
        with self._changed:
            self._running[row] = self._running[-1]
            self._running.pop()
        one.job.deliver(piece)


def _scores(logits: Tensor, tokens: Sequence[int], count: int, offsets: Sequence[int]) -> list[TokenScore]:
    """Of one token for each row of logits [r, V] float32."""
    if not tokens:
        return []
    shares = logits.log_softmax(dim=-1)
    own = shares.gather(1, torch.tensor([list(tokens)], device=logits.device).T)[:, 0].tolist()
    best = shares.topk(count, dim=-1)
    tops = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenScore(*parts) for parts in zip(tokens, own, tops, offsets, strict=True)]

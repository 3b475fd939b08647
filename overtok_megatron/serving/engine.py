"""One thread that owns the model and decodes whatever sequences there are together; the rest of the server only asks it.

Knows no HTTP. A sequence joins the batch as soon as a place is free, between two steps of the others, and leaves it when it
ends, is cancelled or runs out of time. Each has a random stream of its own: what it says depends on its seed, not on others.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from overtok_megatron.errors import OvertokError
from overtok_megatron.inference.generation import Sampling, choose
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.shared_batch import SharedBatch
from overtok_megatron.inference.stream import TextStream

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
class Piece:
    """What a step adds to a sequence. finish: why it ended, with its last piece: stop, length, timeout or error."""

    text: str
    scores: list[TokenScore]
    tokens: int
    finish: str | None


@dataclass
class Job:
    """One sequence to be continued by at most `max_new_tokens` (0: only its prompt's scores are wanted).

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
    deliver: Callable[[Piece], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Running:
    """A job in the batch."""

    def __init__(self, job: Job, trained: TrainedModel, device: torch.device) -> None:
        self.job = job
        self.stream = TextStream(trained.tokenizer, job.stops)
        self.generator = torch.Generator(device=device).manual_seed(job.sampling.seed)
        self.count = 0
        self.token = -1


class Engine:
    """Start it with `with`; leaving ends what runs and joins the thread."""

    def __init__(self, trained: TrainedModel, *, places: int, max_waiting: int) -> None:
        self.trained = trained
        self.places = places
        self.max_waiting = max_waiting
        self._device = next(trained.model.parameters()).device
        self._batch = SharedBatch(trained, places)
        self._running: list[_Running] = []  # in the batch's row order
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    def __enter__(self) -> "Engine":
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
        """Sequences (in the batch, waiting)."""
        return len(self._running), len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of `jobs`, or raise BusyError and take none."""
        with self._changed:
            self._drop_waiting()  # those that were given up hold no place in the queue
            free = self.places - len(self._running)
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
            job.deliver(Piece("", [], 0, "timeout"))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody listens any more: give their places to others."""
        for job in jobs:
            job.cancelled.set()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                self._drop_waiting()
            try:
                self._admit()
                self._step()
            except Exception:  # out of memory, a file that vanished: the requests fail, the server lives
                log.exception("decoding failed; the requests in the batch are given up")
                self._end_all("error")
                self._batch = SharedBatch(self.trained, self.places)
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.deliver(Piece("", [], 0, "error"))
        self._end_all("error")

    def _end_all(self, reason: str) -> None:
        running, self._running = self._running, []
        for one in running:
            one.job.deliver(Piece(one.stream.finish(), [], 0, reason))

    def _admit(self) -> None:
        """Feed the prompts of waiting jobs while there are places, and choose their first tokens."""
        while len(self._running) < self.places:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            one = _Running(job, self.trained, self._device)
            self._running.append(one)  # before the model is asked: if that fails, this job is told so
            logits = self._batch.join(job.prompt, last=not job.prompt_scores).float()  # [1 or p, V]
            scores = self._prompt_scores(job, logits) if job.prompt_scores else []
            if job.max_new_tokens == 0:
                self._leave(len(self._running) - 1, Piece("", scores, 0, "length"))
            else:
                self._advance(len(self._running) - 1, logits[-1:], scores)

    def _step(self) -> None:
        """One more token for every sequence of the batch."""
        for row in range(len(self._running) - 1, -1, -1):
            one = self._running[row]
            if one.job.cancelled.is_set() or time.monotonic() > one.job.deadline:
                self._leave(row, Piece(one.stream.finish(), [], 0, "timeout"))
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
            self._leave(row, Piece(one.stream.finish(), scores, 0, "stop"))
            return
        if job.top_scores is not None:
            offset = len(one.stream.text)
            scores = [*scores, *_scores(logits, [one.token], job.top_scores, [offset])]
        text = one.stream.add(one.token)
        one.count += 1
        if one.stream.stopped:
            self._leave(row, Piece(text, scores, 1, "stop"))
        elif one.count == job.max_new_tokens:
            self._leave(row, Piece(text + one.stream.finish(), scores, 1, "length"))
        else:
            job.deliver(Piece(text, scores, 1, None))

    def _leave(self, row: int, piece: Piece) -> None:
        one = self._running[row]
        self._batch.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        one.job.deliver(piece)

    def _prompt_scores(self, job: Job, logits: Tensor) -> list[TokenScore]:
        """Of the prompt's tokens, from logits [p, V]; offsets are within the prompt's text."""
        stream = TextStream(self.trained.tokenizer)
        offsets = []
        for token in job.prompt:
            offsets.append(len(stream.text))
            stream.add(token)
        first = TokenScore(job.prompt[0], None, [], 0)
        return [first, *_scores(logits[:-1], job.prompt[1:], job.top_scores or 0, offsets[1:])]


def _scores(logits: Tensor, tokens: Sequence[int], count: int, offsets: Sequence[int]) -> list[TokenScore]:
    """Of one token for each row of logits [r, V] float32."""
    if not tokens:
        return []
    shares = logits.log_softmax(dim=-1)
    own = shares.gather(1, torch.tensor([list(tokens)], device=logits.device).T)[:, 0].tolist()
    best = shares.topk(count, dim=-1)
    tops = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenScore(*parts) for parts in zip(tokens, own, tops, offsets, strict=True)]

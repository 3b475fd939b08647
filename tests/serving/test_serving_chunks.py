"""Prompts that are fed in chunks between the steps of others: the same tokens, and nobody waits for a long one."""

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
import torch

from overtok_megatron.inference.continuous_batch import ContinuousBatch
from overtok_megatron.inference.decoder import IncrementalDecoder
from overtok_megatron.inference.generation import generate_tokens
from overtok_megatron.inference.loading import Storage, TrainedModel, load_trained
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.serving import scheduler as scheduler_module
from overtok_megatron.serving.scheduler import BatchScheduler, SequenceRequest, TokenDelta
from support.live_server import live_server
from support.small_models import Endless, full_logits
from support.trained_runs import CONTEXT, TrainedRuns

CPU = torch.device("cpu")


@dataclass
class Asked:
    """A request and what came of it. times: how many deltas of all requests had come before each of its own."""

    prompt: list[int]
    sampling: Sampling
    scores: bool = False
    deltas: list[TokenDelta] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    request: SequenceRequest = field(init=False)

    def submit(self, scheduler: BatchScheduler, clock: list[int], seconds: float = 60.0) -> "Asked":
        """clock: counts the deltas of all requests."""

        def deliver(delta: TokenDelta) -> None:
            self.deltas.append(delta)
            self.times.append(clock[0])
            clock[0] += 1
            if delta.finish:
                self.done.set()

        deadline = time.monotonic() + seconds
        top = 2 if self.scores else None
        size = self.sampling.max_new_tokens
        self.request = SequenceRequest(
            prompt=self.prompt,
            max_new_tokens=size,
            sampling=self.sampling,
            stops=[],
            top_scores=top,
            prompt_scores=self.scores,
            deadline=deadline,
            deliver=deliver,
        )
        scheduler.submit([self.request])
        return self

    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    def expected(self, trained: TrainedModel) -> str:
        """The text that `generate` gives the prompt alone."""
        (tokens,) = generate_tokens(trained, [self.prompt], self.sampling)
        return trained.tokenizer.decode(tokens)


def ended(asked: list["Asked"]) -> list["Asked"]:
    assert all(one.done.wait(60) for one in asked)
    return asked


@pytest.fixture(scope="module")
def trained(trained_runs: TrainedRuns) -> TrainedModel:
    model = trained_runs.trained()
    return replace(model, tokenizer=Endless(model.tokenizer))


def prompt_of(size: int, seed: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (size,), generator=generator).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 8, 1000])
def test_any_chunk_gives_generates_tokens(small_model: TrainedModel, chunk: int) -> None:
    """Ends of documents in the prompts, greedy and sampled, prompts' scores too; more sequences than slots."""
    samplings = [
        Sampling(max_new_tokens=8),
        Sampling(max_new_tokens=8, temperature=1.0, seed=3),
        Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, seed=4),
    ]
    asked = [
        Asked([*prompt_of(size, size, 61)], samplings[size % 3], scores=True) for size in (30, 1, 2, 25, 7, 31, 3, 16)
    ]
    with BatchScheduler(small_model, max_batch=3, max_waiting=20, prefill_chunk=chunk) as scheduler:
        ended([one.submit(scheduler, [0]) for one in asked])
    for one in asked:
        assert one.text() == one.expected(small_model)
        check_scores(small_model, one)


def check_scores(trained: TrainedModel, one: Asked) -> None:
    """Of the prompt's tokens, as one forward pass gives them, with the offsets of their texts."""
    scores = [score for delta in one.deltas for score in delta.scores][: len(one.prompt)]
    assert [score.token for score in scores] == one.prompt
    logprobs = full_logits(trained, torch.tensor([one.prompt]))[0].log_softmax(-1)
    assert scores[0].logprob is None
    for position, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(logprobs[position, score.token].item(), abs=1e-3)
        assert [token for token, _ in score.top] == logprobs[position].topk(2).indices.tolist()
    texts = [trained.tokenizer.decode(one.prompt[:end]) for end in range(len(one.prompt))]
    assert [score.offset for score in scores] == [len(text) for text in texts]


def test_others_go_on_while_a_long_prompt_is_fed(trained: TrainedModel) -> None:
    """A token of theirs for each of its chunks, and all texts are those of generate."""
    short = [
        Asked(prompt_of(2 + seed, seed, 512), Sampling(max_new_tokens=50, temperature=1.0, seed=seed))
        for seed in range(2)
    ]
    long = Asked(prompt_of(56, 9, 512), Sampling(max_new_tokens=6, temperature=1.0, seed=9))
    with BatchScheduler(trained, max_batch=3, max_waiting=9, prefill_chunk=4) as scheduler:
        clock = [0]
        for one in short:
            one.submit(scheduler, clock)
        while not all(one.deltas for one in short):
            time.sleep(0.001)
        begun = clock[0]
        long.submit(scheduler, clock)
        ended([*short, long])
    for one in [*short, long]:
        assert one.text() == one.expected(trained)
    for one in short:
        assert sum(begun <= moment < long.times[0] for moment in one.times) >= 56 // 4 - 1


def test_small_prompts_share_a_chunk(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many tokens of prompts between two steps, over all prompts; and so many where they are there."""
    fed, feed, step = [0], IncrementalDecoder.feed, ContinuousBatch.step

    def counted(decoder: IncrementalDecoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        if not isinstance(decoder, ContinuousBatch):
            fed[-1] += tokens.shape[1]
        return feed(decoder, tokens, **options)

    monkeypatch.setattr(IncrementalDecoder, "feed", counted)
    monkeypatch.setattr(ContinuousBatch, "step", lambda batch, tokens: (fed.append(0), step(batch, tokens))[1])
    asked = [
        Asked(prompt_of(5, seed, 512), Sampling(max_new_tokens=30, temperature=1.0, seed=seed)) for seed in range(6)
    ]
    scheduler = BatchScheduler(trained, max_batch=6, max_waiting=9, prefill_chunk=12)
    for one in asked:
        one.submit(scheduler, [0])  # before its thread begins
    with scheduler:
        ended(asked)
    assert fed[:3] == [12, 12, 6]
    assert not any(fed[3:])


@pytest.fixture
def slow_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of prompts take 50 ms each; how many were fed."""
    feed, fed = IncrementalDecoder.feed, [0]

    def slowly(decoder: IncrementalDecoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        if not isinstance(decoder, ContinuousBatch):
            time.sleep(0.05)
            fed[0] += 1
        return feed(decoder, tokens, **options)

    monkeypatch.setattr(IncrementalDecoder, "feed", slowly)
    return fed


@pytest.mark.parametrize("company", [False, True])
def test_who_leaves_during_the_prompt_frees_the_slot(
    trained: TrainedModel, slow_chunks: list[int], company: bool
) -> None:
    long, late = (
        Asked(prompt_of(60, 1, 512), Sampling(max_new_tokens=2)),
        Asked(prompt_of(60, 2, 512), Sampling(max_new_tokens=2)),
    )
    next_one = Asked(prompt_of(2, 3, 512), Sampling(max_new_tokens=3))
    other = Asked(prompt_of(1, 4, 512), Sampling(max_new_tokens=60, temperature=1.0))
    with BatchScheduler(trained, max_batch=1 + company, max_waiting=9, prefill_chunk=1) as scheduler:
        clock = [0]
        if company:
            other.submit(scheduler, clock)
        long.submit(scheduler, clock)
        while slow_chunks[0] < 4:
            time.sleep(0.01)
        assert scheduler.load == (1 + company, 0)
        scheduler.cancel([long.request])
        late.submit(scheduler, clock, seconds=0.3)  # out of time during its prompt
        next_one.submit(scheduler, clock)
        ended([next_one])
        assert slow_chunks[0] < 30  # not the rest of 60
        assert [delta.finish for delta in late.deltas] == ["timeout"]
        ended([other] * company)
    for one in [next_one, *[other] * company]:
        assert one.text() == one.expected(trained)
    assert scheduler.load == (0, 0)


def test_what_fails_or_ends_during_a_prompt_is_told(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = IncrementalDecoder.feed

    def failing(decoder: IncrementalDecoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        if decoder.cache.lengths[0] >= 4 and not isinstance(decoder, ContinuousBatch):
            raise MemoryError
        return feed(decoder, tokens, **options)

    with BatchScheduler(trained, max_batch=2, max_waiting=9, prefill_chunk=2) as scheduler:
        monkeypatch.setattr(IncrementalDecoder, "feed", failing)
        failed = Asked(prompt_of(9, 1, 512), Sampling(max_new_tokens=2)).submit(scheduler, [0])
        ended([failed])
        monkeypatch.setattr(
            IncrementalDecoder, "feed", lambda *arguments, **options: (time.sleep(0.05), feed(*arguments, **options))[1]
        )
        cut = Asked(prompt_of(60, 1, 512), Sampling(max_new_tokens=2)).submit(scheduler, [0])
        time.sleep(0.2)
    assert [delta.finish for delta in failed.deltas + cut.deltas] == ["error", "error"]


@pytest.mark.parametrize("storage", get_args(Storage))
def test_tables_wherever_they_are(trained_runs: TrainedRuns, trained: TrainedModel, storage: Storage) -> None:
    """Two sequences look rows up in turn: those of a chunk are not those of a step."""
    model = replace(load_trained(trained_runs.run("fp32"), CPU, storage), tokenizer=trained.tokenizer)
    asked = [
        Asked(prompt_of(size, size, 512), Sampling(max_new_tokens=9, temperature=1.0, seed=size))
        for size in (3, 40, 50)
    ]
    with BatchScheduler(model, max_batch=3, max_waiting=9, prefill_chunk=5) as scheduler:
        ended([one.submit(scheduler, [0]) for one in asked])
    assert [one.text() for one in asked] == [one.expected(trained) for one in asked]


def test_a_prompt_of_the_whole_context(trained: TrainedModel) -> None:
    """Its scores alone are wanted: no token follows."""
    with live_server(trained, prefill_chunk=9) as server:
        prompt = prompt_of(CONTEXT, 5, 512)
        (choice,) = server.post(prompt=prompt, max_tokens=0, echo=True, logprobs=0).json()["choices"]
    logprobs = full_logits(trained, torch.tensor([prompt]))[0].log_softmax(-1)
    expected = [logprobs[position, token].item() for position, token in enumerate(prompt[1:])]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert choice["finish_reason"] == "length"


class Guarded(list[Any]):
    """A list that says whether each change of it was made under the scheduler's lock."""

    def __init__(self, lock: threading.Condition, seen: list[bool]) -> None:
        super().__init__()
        self._lock, self._seen = lock, seen

    def append(self, one: Any) -> None:
        self._seen.append(self._lock._is_owned())  # type: ignore[attr-defined]
        super().append(one)

    def pop(self, *index: Any) -> Any:
        self._seen.append(self._lock._is_owned())  # type: ignore[attr-defined]
        return super().pop(*index)


def test_running_sequences_are_listed_under_the_lock(trained_runs: TrainedRuns) -> None:
    scheduler, seen, clock = (
        BatchScheduler(trained_runs.trained(), max_batch=2, max_waiting=9, prefill_chunk=7),
        [],
        [0],
    )
    scheduler._running = Guarded(scheduler._changed, seen)
    with scheduler:
        asked = [
            Asked([5, 6, 7], Sampling(max_new_tokens=size, temperature=1.0, seed=size)).submit(scheduler, clock)
            for size in (3, 9, 4, 6)
        ]
        for one in asked:
            assert one.done.wait(60)
    assert seen == [True] * 8


def test_the_decoding_thread_works_on_the_models_device(
    plain_model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread starts on device 0, where kernels for a model on another device cannot be launched."""
    made: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        scheduler_module, "make_current", lambda device: made.append((threading.current_thread().name, device))
    )
    with BatchScheduler(plain_model, max_batch=1, max_waiting=1, prefill_chunk=8):
        pass
    assert made == [("decoding", CPU)]

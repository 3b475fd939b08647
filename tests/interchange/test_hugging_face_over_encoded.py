"""Over-encoded models in transformers: the same bits there and back, the same tokens from generate, wherever the rows are."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from overtok_megatron.checkpoint.store import find_checkpoint, read_manifest
from overtok_megatron.checkpoint.weights_only import read_dense_weights, read_rows
from overtok_megatron.cli import main
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.inference.generation import generate_tokens
from overtok_megatron.inference.loading import TrainedModel, load_trained
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.interchange.logits_check import our_logits
from overtok_megatron.interchange.sample_text import SAMPLE_TEXT
from overtok_megatron.interchange.tokenizer_files import from_bytes
from support.expect_error import command_error
from support.hugging_face_models import CPU, over_encoded_run, save_tokenizer

STORAGES = ("device", "cpu", "mapped")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "olmo2": (
        {"num_key_value_heads": 2},
        {"ngram_order": 4, "num_slices": 2, "pad_id": 3, "row_dtype": "float32", "combine": "mean"},
    ),
    "olmo3": (
        {"sliding_window": 6, "attention_pattern": ["sliding", "full"]},
        {"num_slices": 3, "combine": "scaled", "hash_base": 1000, "row_dtype": "int8"},
    ),
    "llama": (
        {"norm_placement": "pre", "qk_norm": "none", "head_size": 16, "tie_word_embeddings": True},
        {"ngram_order": 2, "num_slices": 1, "combine": "scaled", "boundary": "ignore", "row_width": 12}
        | {"added": [{"orders": [5, 2], "num_slices": 1, "table_rows": 613}, {"orders": [3], "table_rows": 90}]},
    ),
    "olmo2-of-n-grams-alone": ({}, {"combine": "scaled", "word_embedding": False}),
    "olmoe": (
        {"norm_placement": "pre", "num_experts": 4, "num_experts_per_token": 2},
        {"ngram_order": 3, "num_slices": 1, "combine": "sum", "row_dtype": "bfloat16"},
    ),
}
PROMPTS = ["Four score and", "a", "we can not dedicate -- we can not consecrate", "x = [1,"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY-run: a run of ours; FAMILY: what was exported of it, logits compared."""
    folder = tmp_path_factory.mktemp("over-encoded")
    save_tokenizer(folder / "tokenizer.json")
    (folder / "text.txt").write_text(SAMPLE_TEXT * 30, encoding="utf-8")
    train_sentencepiece([folder / "text.txt"], 400, folder / "tokenizer.model")
    for family, (model, over) in CASES.items():
        tokenizer = folder / ("tokenizer.model" if family in ("olmo2", "llama") else "tokenizer.json")
        over_encoded_run(folder / f"{family}-run", tokenizer, model, over)
        words = ["--output", str(folder / family), "--max-shard-size", "100KB"]
        assert main(["export", str(folder / f"{family}-run"), *words]) == 0
    return folder


def theirs(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def with_ends(trained: TrainedModel, length: int = 60) -> torch.Tensor:
    """Real text with ends of documents in it, and one right at the beginning; [2, length]."""
    tokens = torch.tensor(trained.tokenizer.encode(SAMPLE_TEXT)[: 2 * length]).view(2, length)
    tokens[0, 0] = tokens[:, 20] = tokens[1, 33:35] = trained.tokenizer.eod_id
    return tokens


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_logits_in_one_piece_in_many_and_behind_padding(workspace: Path, family: str) -> None:
    trained = load_trained(workspace / f"{family}-run", CPU)
    tokens = with_ends(trained)
    expected = our_logits(trained, tokens)
    near = {"rtol": 1e-5, "atol": 1e-5 * expected.abs().max().item()}
    for storage in STORAGES:
        model = theirs(workspace / family, table_storage=storage)
        torch.testing.assert_close(model(tokens).logits, expected, **near)
        cache, pieces = None, []
        for piece in tokens.split([7, 1, 1, 20, 31], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **near)
    padded = torch.cat([torch.full((2, 9), trained.tokenizer.eod_id + 1), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :9] = 0
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 9:], expected, **near)


@pytest.mark.parametrize("family", CASES)
def test_generate_gives_our_tokens(workspace: Path, family: str) -> None:
    trained = load_trained(workspace / f"{family}-run", CPU)
    tokenizer = AutoTokenizer.from_pretrained(workspace / family, trust_remote_code=True)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    ours = generate_tokens(
        trained, [trained.tokenizer.encode(prompt) for prompt in PROMPTS], Sampling(max_new_tokens=24)
    )
    end = trained.tokenizer.eod_id
    for storage in STORAGES:
        model = theirs(workspace / family, table_storage=storage)
        made = model.generate(**batch, max_new_tokens=24)[:, batch["input_ids"].shape[1] :].tolist()
        assert [line[: line.index(end)] if end in line else line for line in made] == ours, storage
    assert len({tuple(line) for line in ours}) == len(PROMPTS)
    searching = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    beams = model.generate(**batch, **searching)
    assert torch.equal(beams, model.generate(**batch, **searching, use_cache=False))  # histories follow their beams
    chunks = model.generate(**batch, max_new_tokens=8, prefill_chunk_size=4)
    assert torch.equal(chunks, model.generate(**batch, max_new_tokens=8))


@pytest.mark.parametrize("family", CASES)
def test_back_again_has_the_same_bits(workspace: Path, tmp_path: Path, family: str) -> None:
    assert main(["import", str(workspace / family), "--output", str(tmp_path / "run")]) == 0
    before, after = (find_checkpoint(run) for run in (workspace / f"{family}-run", tmp_path / "run"))
    manifests = [read_manifest(path) for path in (before, after)]
    dense = [dict(read_dense_weights(path, own)) for path, own in zip((before, after), manifests, strict=True)]
    assert dense[0].keys() == dense[1].keys()
    for name, weight in dense[0].items():
        assert torch.equal(weight, dense[1][name]), name
    rows = [list(read_rows(path)) for path in (before, after)]
    for column in rows[0][0][1]:
        old, new = (torch.cat([part[column] for _, part in own]) for own in rows)
        assert old.dtype == new.dtype and torch.equal(old, new), column
    for section in ("model", "over_encoding"):
        assert manifests[0].config[section] == manifests[1].config[section]
    assert manifests[0].eod_id == manifests[1].eod_id
    assert manifests[0].tokenizer_fingerprint == manifests[1].tokenizer_fingerprint


def test_rows_are_where_they_are_asked_to_be(workspace: Path, tmp_path: Path) -> None:
    """Mapped rows are not parameters of the model; save_pretrained of transformers copies them all."""
    model = theirs(workspace / "olmo2", table_storage="mapped")
    held = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    assert held < sum(model.over_encoding.sizes) * model.over_encoding.width / 3
    assert type(model.over_encoding.store).__name__ == "RowsInFiles"
    model.save_pretrained(tmp_path / "saved")
    again = theirs(tmp_path / "saved", table_storage="device")
    tokens = torch.arange(30)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.to(torch.bfloat16).over_encoding.store.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="table_storage: nowhere"):
        theirs(workspace / "olmo2", table_storage="nowhere")


@torch.no_grad()
def test_a_cache_keeps_its_history(workspace: Path) -> None:
    model = theirs(workspace / "olmo2", table_storage="cpu")
    tokens = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(3))
    whole = model(tokens).logits
    start = model(tokens[:, :20], use_cache=True).past_key_values
    other = copy.deepcopy(start)
    swapped = model(tokens[:, 20:], past_key_values=start).logits
    torch.testing.assert_close(swapped, whole[:, 20:], rtol=1e-4, atol=1e-4)
    other.reorder_cache(torch.tensor([1, 0]))
    turned = model(tokens[:, 20:].flip(0), past_key_values=other).logits
    torch.testing.assert_close(turned, whole[:, 20:].flip(0), rtol=1e-4, atol=1e-4)
    stranger = DynamicCache(config=model.config)
    model.model(tokens[:, :20], past_key_values=stranger)
    with pytest.raises(ValueError, match="n-gram history"):
        model(tokens[:, 20:], past_key_values=stranger)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 48))


def test_tokenizers_give_the_same_ids(workspace: Path) -> None:
    text = (
        SAMPLE_TEXT
        + "\n\n\n  tabs\t and </s> 12345 \u00fcber \U0001f600"
        + (workspace / "olmo2" / "README.md").read_text()
    )
    for family in ("olmo2", "olmoe"):
        ours = load_trained(workspace / f"{family}-run", CPU, "mapped").tokenizer
        tokenizer = AutoTokenizer.from_pretrained(workspace / family, trust_remote_code=True)
        plain = text.replace("</s>", "")  # transformers takes a special token's text for the token
        assert tokenizer(plain)["input_ids"] == ours.encode(plain)
        assert tokenizer.decode(ours.encode(plain)) == plain
        assert tokenizer.eos_token_id == ours.eod_id
    data = load_tokenizer("bytes", None)
    assert from_bytes(256).encode(text).ids == data.encode(text)
    assert from_bytes(256).decode(data.encode(text)) == text


def test_code_of_strangers_is_not_executed(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(workspace / "llama", folder)
    with (folder / "modeling_overtok.py").open("a") as file:
        file.write(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    line = command_error(capsys, "import", str(folder), "--output", str(tmp_path / "run"), alone=False)
    assert "modeling_overtok.py" in line and "--no-check" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()
    assert main(["import", str(folder), "--output", str(tmp_path / "run"), "--no-check"]) == 0
    assert not (tmp_path / "executed").exists()

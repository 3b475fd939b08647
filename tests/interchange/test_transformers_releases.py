"""Exports compute the same in the transformers releases that they name: both forms of the rotary keys; others are refused."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from overtok_megatron.cli import main
from overtok_megatron.config.schema import ModelConfig, RunConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.inference.loading import load_trained
from overtok_megatron.interchange import exporting
from overtok_megatron.interchange.families import hugging_face_values, model_section, require_transformers
from overtok_megatron.interchange.importing import complete_values
from overtok_megatron.interchange.logits_check import our_logits
from overtok_megatron.interchange.rotary_form import release_4_values
from overtok_megatron.interchange.sample_text import SAMPLE_TEXT
from support.hugging_face_models import CPU, over_encoded_run, save_tokenizer

LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_FULL = LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {"rope_theta": 5e5, "num_key_value_heads": 2},
    "olmo3": {"rope_theta": 3e5, "sliding_window": 6, "attention_pattern": ["sliding", "full"]},
    "llama": {"rope_theta": 2e5, "norm_placement": "pre", "qk_norm": "none", "head_size": 16},
    "olmoe": {"rope_theta": 1e5, "norm_placement": "pre", "num_experts": 4, "num_experts_per_token": 2},
}


def version_4(scaling: dict[str, Any]) -> dict[str, Any]:
    """A section of ours by the names of transformers 4."""
    return {"rope_type" if key == "type" else key: value for key, value in scaling.items()}


@pytest.mark.parametrize("scaling", [None, LINEAR, YARN, LLAMA3], ids=["plain", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_has_both_forms(family: str, scaling: dict[str, Any] | None) -> None:
    """And release 5, which takes the older form where it finds it, computes the same from the file as from its own form."""
    model = section(family, scaling)
    made = transformers.CONFIG_MAPPING[family](**hugging_face_values(model, 512)).to_dict()
    written = json.loads(json.dumps(exporting.config_values(run_config(model), eod_id=7)))
    assert written["rope_theta"] == FAMILIES[family]["rope_theta"]
    expected = None if scaling is None else version_4(LLAMA3_FULL if scaling is LLAMA3 else scaling)
    full = written["rope_parameters"]["full_attention"] if family == "olmo3" else written["rope_parameters"]
    assert full == {"rope_type": "default", "rope_theta": model.rope_theta} | (expected or {})
    if family == "olmo2" and scaling is LINEAR:
        expected = LINEAR  # its own check in release 4 wants these two keys
    assert written["rope_scaling"] == expected
    again = transformers.CONFIG_MAPPING[family].from_dict(written).to_dict()
    assert model_section(again, "here") == model_section(made, "here")
    assert model_section(again, "here").rope_theta == model.rope_theta


def section(family: str, scaling: dict[str, Any] | None) -> ModelConfig:
    shape = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_layers": 2, "num_attention_heads": 4}
    return ModelConfig.model_validate(shape | FAMILIES[family] | {"rope_scaling": scaling})


def run_config(model: ModelConfig) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": model.model_dump(mode="json"),
            "data": {"train": "none", "seq_length": 64},
            "optimizer": {"learning_rate": 1e-3},
            "tokenizer": {"type": "bytes"},
            "training": {"output_directory": "none", "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1},
        }
    )


def test_a_stretch_by_one_is_left_out_for_olmo2() -> None:
    """transformers 4 refuses it there; it changes no angle."""
    model = section("olmo2", {"type": "linear", "factor": 1.0})
    assert release_4_values(model, "olmo2") == {"rope_theta": 5e5, "rope_scaling": None}


@pytest.mark.parametrize("scaling", [LINEAR, YARN], ids=["linear", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "olmoe"])
def test_the_older_forms_are_read(family: str, key: str, scaling: dict[str, Any]) -> None:
    given = {key if name == "type" else name: value for name, value in scaling.items()}
    raw = {"model_type": family, "rope_theta": 5e5, "rope_scaling": given, "num_hidden_layers": 4}
    section = model_section(completed(raw), "here")
    assert section.rope_theta == 5e5
    assert section.rope_scaling is not None
    assert section.rope_scaling.model_dump(exclude_none=True) == scaling


def completed(raw: dict[str, Any]) -> dict[str, Any]:
    return complete_values(raw, Path("config.json"))


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "type: linear"),
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "linear", "factor": 2.0, "mscale": 1.0}, "mscale"),
        ({"type": "yarn", "factor": 2.0, "truncate": False}, "truncate"),
    ],
)
def test_what_is_not_supported_in_the_older_form_is_named(scaling: dict[str, Any], said: str) -> None:
    raw = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling}
    with pytest.raises(CheckpointError, match=said):
        model_section(completed(raw), "here")


def test_an_older_form_that_release_5_does_not_understand_is_named() -> None:
    """Its Olmo3 would leave the angles as they are, where release 4 stretches them."""
    raw = {"model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": LINEAR, "num_hidden_layers": 4}
    with pytest.raises(CheckpointError, match="write rope_type alone"):
        model_section(completed(raw), "here")
    newer = raw | {"rope_scaling": version_4(LINEAR)}
    scaling = model_section(completed(newer), "here").rope_scaling
    assert scaling is not None and scaling.type == "linear"


def test_yarn_that_rounds_its_bounds_is_the_only_yarn() -> None:
    """`truncate: true` is what transformers does without the key."""
    raw = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": YARN | {"truncate": True}}
    assert model_section(completed(raw), "here").rope_scaling is not None


def load_modeling() -> Any:
    path = Path(exporting.__file__).with_name(exporting.MODELING)
    spec = importlib.util.spec_from_file_location("modeling_overtok_released", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_modelling_file_refuses_other_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = importlib.import_module("transformers")  # as the file finds it
    for release in ("4.56.2", "6.0.0", "4.9.1"):
        monkeypatch.setattr(transformers, "__version__", release)
        with pytest.raises(ImportError, match=f"{release} is installed.*4.57 or later, below 6.0"):
            load_modeling()
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    config = load_modeling().OvertokOlmoeConfig
    with pytest.raises(ImportError, match=r"install 5\.0 or later, below 6\.0"):
        config.from_dict({"model_type": "overtok_olmoe", "transformers_releases": [["5.0", "6.0"]]})
    monkeypatch.setattr(transformers, "__version__", "5.1.0")
    config = load_modeling().OvertokOlmoeConfig
    assert config.from_dict({"model_type": "overtok_olmoe", "transformers_releases": [["5.0", "6.0"]]}) is not None
    with pytest.raises(ImportError, match=r"install 4\.57 or later, below 5\.0, or 5\.13 or later, below 6\.0"):
        config.from_dict({"transformers_releases": [["4.57", "5.0"], ["5.13", "6.0"]]})


def test_other_releases_make_no_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", "4.57.6")
    with pytest.raises(CheckpointError, match=r"4\.57\.6 is installed.*need 5\.0 or later"):
        require_transformers()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "olmo2-linear": ("olmo2", {"rope_scaling": LINEAR}),
    "olmo2-wide": ("olmo2", {"head_size": 16}),
    "olmo2-yarn": ("olmo2", {"rope_scaling": YARN}),
    "olmo3-yarn": ("olmo3", {"rope_scaling": YARN}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-linear": ("llama", {"rope_scaling": LINEAR}),
    "olmoe-yarn": ("olmoe", {"rope_scaling": YARN}),
    "olmoe-linear": ("olmoe", {"rope_scaling": LINEAR}),
}
REFUSED = {  # by the modelling file; plain exports of olmo2-yarn by release 4's own class
    "4.57.6": {"olmo2-yarn", "olmo2-yarn-over", "olmoe-over", "olmoe-yarn-over", "olmoe-linear-over"},
    "5.0.0": {"olmo3-yarn-over"},
    "5.13.0": set(),
}
OTHERWISE = {"5.0.0": {"olmo3-yarn"}}  # computed otherwise, and nothing of ours is there to refuse it: the card says it
SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
folder, made, said = Path(sys.argv[1]), {}, {}
tokens = load_file(folder / "tokens.safetensors")["tokens"]
for name in json.loads((folder / "names.json").read_text()):
    over = name.endswith("-over")
    settings = {"trust_remote_code": True, "table_storage": "mapped"} if over else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder / name, **settings).eval()
        with torch.no_grad():
            made[name] = model(tokens, use_cache=False).logits.float().contiguous()
            first = model(tokens[:, :40], use_cache=True)
            again = model(tokens[:, 40:], past_key_values=first.past_key_values, use_cache=True)
            made[name + " in two"] = torch.cat([first.logits, again.logits], dim=1).float().contiguous()
            made[name + " text"] = model.generate(tokens[:1, :20], max_new_tokens=12, do_sample=False)[0, 20:].contiguous()
    except (ImportError, ValueError, KeyError) as error:
        said[name] = f"{type(error).__name__}: {error}"
made["ids"] = torch.tensor(AutoTokenizer.from_pretrained(folder / "olmo2")((folder / "text.txt").read_text())["input_ids"])
save_file(made, folder / "made.safetensors")
print(json.dumps({"release": transformers.__version__, "said": said}))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as a plain and as an over-encoded export, and what ours computes."""
    folder = tmp_path_factory.mktemp("releases")
    save_tokenizer(folder / "tokenizer.json")
    (folder / "text.txt").write_text(SAMPLE_TEXT, encoding="utf-8")
    expected, names = {}, []
    for case, (family, more) in CASES.items():
        for over in ({"enabled": False}, {"ngram_order": 3, "num_slices": 1}):
            name = case + ("" if "enabled" in over else "-over")
            names.append(name)
            over_encoded_run(folder / f"{name}-run", folder / "tokenizer.json", FAMILIES[family] | more, over)
            assert main(["export", str(folder / f"{name}-run"), "--output", str(folder / name), "--no-check"]) == 0
            trained = load_trained(folder / f"{name}-run", CPU)
            tokens = torch.tensor([trained.tokenizer.encode(SAMPLE_TEXT)[:60]])
            expected[name] = our_logits(trained, tokens).contiguous()
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    save_file(expected, folder / "expected.safetensors")
    (folder / "names.json").write_text(json.dumps(names))
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("release", REFUSED)
@pytest.mark.timeout(600)
def test_exports_in_other_releases(exports: Path, tmp_path: Path, release: str) -> None:
    """The same logits, in one piece and in two, and the same ids; what a release would compute otherwise is refused."""
    python = environment(tmp_path / "environment", f"transformers=={release}")
    alone = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # torch's plugins, ours among them, are not all there
    done = subprocess.run([python, "-c", SCRIPT, str(exports)], capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["release"] == release
    made, expected = load_file(exports / "made.safetensors"), load_file(exports / "expected.safetensors")
    refused, otherwise = REFUSED[release], OTHERWISE.get(release, set())
    assert report["said"].keys() == refused, report["said"]
    for name in refused | otherwise:
        if name.endswith("-over"):
            assert "would compute something else than this model" in report["said"][name]
        card = (exports / name / "README.md").read_text()
        assert ("5.13 or later" if release == "5.0.0" else "5.0 or later, below 6.0") in card
    for name, logits in expected.items():
        if name in refused | otherwise:
            continue
        near = {"rtol": 1e-5, "atol": 1e-5 * logits.abs().max().item()}
        torch.testing.assert_close(made[name], logits, **near, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(made[f"{name} in two"], logits, **near)
        assert made[f"{name} text"].numel() == 12 or made[f"{name} text"][-1] == 0
    tokenizer = load_trained(exports / "olmo2-run", CPU).tokenizer
    assert made["ids"].tolist() == tokenizer.encode(SAMPLE_TEXT)


def environment(folder: Path, requirement: str) -> Path:
    """A Python with `requirement`, and everything else of the one that runs this, torch above all."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True, stdout=subprocess.DEVNULL)
    packages = Path(torch.__file__).parents[1]  # behind its own: what it has installed itself comes first
    own = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (own / "behind.pth").write_text(f"{packages}\n", encoding="utf-8")
    return python

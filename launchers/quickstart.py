"""The quickstart, through the commands that a user types: prepare the data, train two models, compare them, generate text."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.validation import validate
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import hold_out_last, sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.environment import usable_devices
from overtok_megatron.errors import ConfigError, OvertokError
from overtok_megatron.launching.console import overtok_output, run_overtok
from overtok_megatron.parallel.devices import num_accelerators
from overtok_megatron.reports.curves import RunCurve, draw_curves, read_curve, table

CONFIGS = {"baseline": "configs/quickstart_baseline.yaml", "over-encoded": "configs/quickstart_overtok.yaml"}
HELD_OUT = 0.03  # share of the corpus, the last speeches in time
PROMPT = "The state of the Union is"


def prepare_data(folder: Path, vocab_size: int) -> None:
    """Tokenizer and both sets, made once."""
    model = folder / "tokenizer.model"
    training, held_out = hold_out_last(sotu_files(), HELD_OUT)
    print(f"corpus: {len(training)} speeches to train on, the last {len(held_out)} held out", flush=True)
    if not model.exists():
        train_sentencepiece(training, vocab_size, model)
    tokenizer = load_tokenizer("sentencepiece", model)
    for name, files in (("train", training), ("validation", held_out)):
        size = sum(path.stat().st_size for path in files)
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenizing {name}") as bar:
            prepare(files, folder / name, tokenizer, bar.update)


def fitting_ranks(overrides: list[str]) -> int:
    """As many ranks as there are GPUs, or two on a CPU; fewer where the batch is not divisible by that."""
    loaded = [load_config(path, overrides) for path in CONFIGS.values()]
    for ranks in range(usable_devices(os.environ, num_accelerators()) or 2, 0, -1):
        try:
            for one in loaded:
                validate(one.config, ranks, one.locate)
        except ConfigError as error:
            problem = error
        else:
            return ranks
    raise problem


def curves(overrides: list[str]) -> list[RunCurve]:
    """Train both runs and read back what they wrote."""
    ranks = fitting_ranks(overrides)
    result = []
    for name, path in CONFIGS.items():
        print(f"training the {name} model on {ranks} ranks", flush=True)
        run_overtok("train", path, *overrides, "logging.progress_bar=on", "--processes", ranks)
        config = load_config(path, overrides).config
        result.append(read_curve(name, Path(config.training.output_directory), parameter_counts(config)))
    return result


def main(overrides: list[str]) -> int:
    try:
        config = load_config(CONFIGS["baseline"], overrides).config
        root = Path(config.training.output_directory).parent
        assert config.tokenizer.path is not None, "both configurations name a sentencepiece model"
        prepare_data(Path(config.tokenizer.path).parent, config.model.vocab_size)
        runs = curves(overrides)
    except OvertokError as error:
        print("\n".join(f"error: {line}" for line in error.lines), file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    samples = {
        run.name: overtok_output(
            "generate", run.directory, "--prompt", PROMPT, "--temperature", 0.7, "--max-new-tokens", 60
        )
        for run in runs
    }
    for name, text in samples.items():
        print(f"\n--- {name}: {text.strip()}")
    summary = table(runs)
    (root / "summary.md").write_text(summary, encoding="utf-8")
    draw_curves(runs, root / "curves.png")
    print(f"\n{summary}\n{root / 'summary.md'}  {root / 'curves.png'}  (tensorboard --logdir {root})")
    ends = {run.name: run.ends.get("", run.ends) for run in runs}  # numbers, or a mapping of named validation sets
    (root / "summary.json").write_text(json.dumps(ends), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

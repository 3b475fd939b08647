"""Does a grown input vocabulary help a trained model to learn another kind of text? `python tools/adaptation.py`

Trains a small model on presidential addresses, plain and over-encoded, and adapts each to the source code of Python's standard
library twice, over the same batches: as it is, and with n-gram tables that `overtok grow` has added. Prints the validation
losses on held-out code; seeds are those of the new projections and of the order of batches. All lies in runs/adaptation/.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from statistics import mean

from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.loading import load_config
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import hold_out_last, sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.launching.console import run_overtok
from overtok_megatron.reports.curves import read_curve
from overtok_megatron.run_folder import RunFolder

ROOT = Path("runs/adaptation")
CONFIG = "configs/adaptation.yaml"
HELD_OUT = 0.03  # share of a corpus
OLD_TABLES = ["over_encoding.enabled=true", "over_encoding.num_slices=1", "over_encoding.table_rows=66753"]  # 32.6 V
NEW_TABLES = "orders=2-3,slices=2,rows=263413"  # 128.62 V
ROW_WIDTH = 32  # hidden_size 64 over two old tables
SOURCES = {"plain": (), "over-encoded": OLD_TABLES}


def code_files() -> list[Path]:
    """The modules of the running Python's standard library, in the order of their names' hashes: those held out are any."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts)]
    return sorted(files, key=lambda path: sha256(path.relative_to(folder).as_posix().encode()).digest())


def prepare_data(vocab_size: int) -> None:
    """Both texts with the tokenizer of the first, made once."""
    folder = ROOT / "data"
    if (folder / "code_held_out.json").exists():
        return
    speeches, code = hold_out_last(sotu_files(), HELD_OUT), hold_out_last(code_files(), HELD_OUT)
    train_sentencepiece(speeches[0], vocab_size, folder / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    for name, (training, held_out) in (("speeches", speeches), ("code", code)):
        prepare(training, folder / name, tokenizer)
        prepare(held_out, folder / f"{name}_held_out", tokenizer)


def train(config: str, own: Sequence[str], options: argparse.Namespace) -> None:
    run_overtok("train", config, *own, *options.overrides, "--processes", options.processes)


def adapt(source: Path, output: Path, seed: int, options: argparse.Namespace) -> float:
    """Train what `source` holds on the code; the validation loss in the end, nats a token."""
    code = ROOT / "data" / "code"
    own = [
        f"training.output_directory={output}",
        f"training.initial_checkpoint={source}",
        f"training.train_tokens={options.tokens}",
        f"data.train={code}",
        f"data.validation={code}_held_out",
        f"data.shuffle_seed={seed}",
        f"optimizer.learning_rate={options.learning_rate}",
    ]
    train(str(RunFolder(source).config), own, options)
    curve = read_curve(output.name, output, parameter_counts(load_config(RunFolder(output).config).config))
    return curve.ends[""]


def compare(name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Validation losses of one source and seed: as it is, grown."""
    base, grown = ROOT / name, ROOT / f"{name}-grown-{seed}"
    own = [f"training.output_directory={base}", *SOURCES[name]]
    train(CONFIG, own, options)  # nothing to do the second time
    if not grown.exists():
        # rows of a plain model's first tables are to be as wide as those of the over-encoded one
        special = ["--freeze"] if SOURCES[name] else [f"over_encoding.row_width={ROW_WIDTH}"]
        run_overtok("grow", base, "--output", grown, "--tables", NEW_TABLES, *special, f"training.seed={seed}")
    plain = adapt(base, ROOT / f"{name}-adapted-{seed}", seed, options)
    return plain, adapt(grown, ROOT / f"{grown.name}-adapted", seed, options)


def report(losses: dict[str, list[tuple[float, float]]]) -> str:
    """A Markdown table: means over seeds, and the gap with its range."""
    lines = ["| model | fine-tuned | grown, then fine-tuned | gap over seeds |", "| --- | --- | --- | --- |"]
    for name, pairs in losses.items():
        gaps = sorted(plain - grown for plain, grown in pairs)
        means = [f"{mean(side):.4f}" for side in zip(*pairs, strict=True)]
        lines.append(f"| {name} | {means[0]} | {means[1]} | {gaps[0]:.3f} to {gaps[-1]:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all training runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=400_000, help="of adaptation")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of adaptation")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    (ROOT / "data").mkdir(parents=True, exist_ok=True)
    prepare_data(load_config(CONFIG).config.model.vocab_size)
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in SOURCES}
    for seed in options.seeds:
        for name in SOURCES:
            losses[name].append(compare(name, seed, options))
            (ROOT / "summary.md").write_text(report({key: own for key, own in losses.items() if own}) + "\n")
    print(report(losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())

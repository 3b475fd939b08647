"""The text of a study, made once: a tokenizer of the training text, and sets for training, validation and the final test.

Held-out text is never in training. Of the presidential addresses the last ones in time are held out. A folder of texts has a
folder for each set, and a document that lies in two sets is refused.
"""

import hashlib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from overtok_megatron.config.loading import load_config
from overtok_megatron.config.wording import short
from overtok_megatron.data.manifest import dataset_paths
from overtok_megatron.data.preparing.inputs import find_inputs
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.sources import ReadOptions, read_documents
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import hold_out_last, sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.errors import DataError
from overtok_megatron.run_lock import hold
from overtok_megatron.studies.study_file import CorpusSection, Study

SETS = ("train", "validation", "test")
SPEECHES = "sotu"  # the value of corpus.text that names the package
ROOT = Path("runs") / "studies" / "data"


def prepare_corpus(study: Study, tell: Callable[[str], object]) -> dict[str, str]:
    """Values of configuration keys that name the study's prepared sets; they are made where they are missing.

    Without a corpus the base configuration's own data stays. Raises DataError where the text is missing, CheckpointError where
    another process prepares the same sets.
    """
    corpus = study.section.corpus
    if corpus is None:
        return {}
    folder = _folder(study, corpus)
    if not all(dataset_paths(folder / name)[2].is_file() for name in SETS):
        with hold(folder, "overtok study: preparing a corpus"):
            _prepare(corpus, folder, _vocab_size(study), tell)
    return {
        "tokenizer.path": str(folder / "tokenizer.model"),
        "data.train": str(folder / "train"),
        "data.validation": str(folder / "validation"),
    }


def final_set(study: Study) -> Path | None:
    """The prefix of the set that is read once in the end; None for a study of a user's own data."""
    corpus = study.section.corpus
    return None if corpus is None else _folder(study, corpus) / "test"


def _folder(study: Study, corpus: CorpusSection) -> Path:
    """Where the sets lie: one folder for each text and size of vocabulary."""
    return ROOT / f"{corpus.name.replace(' ', '-')}-{_vocab_size(study)}"


def _vocab_size(study: Study) -> int:
    return load_config(str(study.base)).config.model.vocab_size


def _prepare(corpus: CorpusSection, folder: Path, vocab_size: int, tell: Callable[[str], object]) -> None:
    files = corpus_files(corpus)
    size = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
    tell(f"corpus {corpus.name}: " + ", ".join(f"{name} {bytes_ / 1e6:.1f} MB" for name, bytes_ in size.items()))
    model = folder / "tokenizer.model"
    if not model.exists():
        train_sentencepiece(files["train"], vocab_size, model, ReadOptions(separator=corpus.separator))
    tokenizer = load_tokenizer("sentencepiece", model)
    for name, paths in files.items():
        if not dataset_paths(folder / name)[2].is_file():
            manifest = prepare(paths, folder / name, tokenizer, separator=corpus.separator)
            tell(f"{folder / name}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")


def corpus_files(corpus: CorpusSection) -> dict[str, list[Path]]:
    """The text files of each set. Raises DataError where they are missing, or sets share a document."""
    if corpus.text == SPEECHES:
        rest, test = hold_out_last(sotu_files(), corpus.test)
        train, validation = hold_out_last(rest, corpus.validation)
        return dict(zip(SETS, (train, validation, test), strict=True))
    folder = Path(corpus.text)
    missing = [folder / name for name in SETS if not (folder / name).is_dir()]
    if missing:
        way_out = f"write it by: {corpus.made_by}" if corpus.made_by else "it needs train/, validation/ and test/"
        raise DataError(f"corpus.text: {missing[0]}: no such folder; {way_out}")
    files = {name: _chosen(find_inputs([folder / name]).files, corpus) for name in SETS}
    _refuse_shared(files, corpus.separator)
    return files


def _chosen(files: list[Path], corpus: CorpusSection) -> list[Path]:
    """The files that match a pattern of corpus.parts. Raises DataError where none does."""
    if corpus.parts is None:
        return files
    chosen = [path for path in files if any(fnmatch(path.name, pattern) for pattern in corpus.parts)]
    if not chosen:
        names = short(", ".join(path.name for path in files))
        raise DataError(
            f"corpus.parts: {short(', '.join(corpus.parts))}; {files[0].parent} has no such file; it has {names}"
        )
    return chosen


def _refuse_shared(files: dict[str, list[Path]], separator: str | None) -> None:
    """Raise DataError where a document lies in two sets."""
    seen: dict[bytes, str] = {}
    for name in reversed(SETS):
        own = {
            hashlib.sha256(text.strip().encode()).digest()
            for text in read_documents(files[name], ReadOptions(separator=separator))
            if text.strip()
        }
        shared = next((seen[digest] for digest in own if digest in seen), None)
        if shared is not None:
            raise DataError(
                f"corpus.text: {files[name][0].parent} and {shared} share a document; remove it from one of them"
            )
        seen |= dict.fromkeys(own, name)

"""A tiny corpus, tokenizer, dataset and configuration on disk, and the console command as a subprocess."""

from pathlib import Path

import pytest

from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from support.host_runs import one_host
from support.workspace import Workspace

__all__ = ["one_host"]

VOCAB = 512


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and both sets from a few speeches."""
    folder = tmp_path_factory.mktemp("data")
    files = sotu_files()
    train_sentencepiece(files[:6], VOCAB, folder / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    prepare(files[:6], folder / "train", tokenizer)
    prepare(files[6:7], folder / "validation", tokenizer)
    return folder


@pytest.fixture
def workspace(data_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(data_folder, tmp_path)

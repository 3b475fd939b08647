"""A tiny tokenizer and datasets for runs that are started in several ways."""

from pathlib import Path

import pytest

from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from support.workspace import Workspace


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and both sets from a few speeches."""
    folder = tmp_path_factory.mktemp("data")
    files = sotu_files()
    train_sentencepiece(files[:2], 512, folder / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    prepare(files[:2], folder / "train", tokenizer)
    prepare(files[2:3], folder / "validation", tokenizer)
    return folder


@pytest.fixture
def workspace(data_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(data_folder, tmp_path)

"""Sets that megatron-core's builder wrote are read as it reads them; ours it reads; what does not fit is named."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from overtok_megatron.cli import main
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.preparing.adopt import adopt
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import DataError

DOCUMENTS = [[[5, 6], [7]], [[8, 9, 10, 100]], [[11], [12], [13, 14]]]  # sequences of each
STREAM = [token for document in DOCUMENTS for sequence in document for token in sequence]


def build(prefix: Path, dtype: type, documents: list[list[list[int]]] = DOCUMENTS) -> object:
    """Through megatron-core's builder; its own reader of the result."""
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return module.IndexedDataset(str(prefix))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_what_megatron_wrote_is_read_as_megatron_reads_it(tmp_path: Path, dtype: type) -> None:
    theirs = build(tmp_path / "set", dtype)
    manifest, ended = adopt(tmp_path / "set", ByteTokenizer())
    ours = IndexedDataset(tmp_path / "set")
    assert ours.tokens(0, ours.num_tokens).tolist() == np.concatenate(list(theirs)).tolist() == STREAM
    assert ours.tokens(3, 4).dtype == np.int64
    assert ours.document_lengths.tolist() == [3, 4, 4]
    assert (manifest.num_documents, manifest.num_tokens, ended) == (3, 11, 0)
    ours.verify()


def test_documents_that_end_are_counted(tmp_path: Path) -> None:
    build(tmp_path / "set", np.int32, [[[1, 256]], [[2], [256]], [[3]]])
    assert adopt(tmp_path / "set", ByteTokenizer())[1] == 2


def test_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "set", np.uint16, [[[104, 105, 256]]])
    prefix = str(tmp_path / "set")
    assert main(("verify", prefix)) == 2
    assert "overtok adopt" in capsys.readouterr().err
    assert main(("adopt", prefix, "--tokenizer", "bytes")) == 0
    assert "1 documents, 3 tokens; 1 documents end with the end-of-document token 256" in capsys.readouterr().out
    assert main(("verify", prefix)) == 0
    assert main(("adopt", prefix, "--tokenizer", "bytes")) == 2
    assert "is there already" in capsys.readouterr().err


def fails(prefix: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        adopt(prefix, ByteTokenizer())
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert not Path(f"{prefix}.json").exists()


def test_tokens_of_another_vocabulary(tmp_path: Path) -> None:
    build(tmp_path / "set", np.int32, [[[1, 2], [257, 3]]])
    fails(tmp_path / "set", "set.bin: token 2 is 257", "ids 0 to 256")
    build(tmp_path / "low", np.int8, [[[1, -2]]])
    fails(tmp_path / "low", "token 1 is -2")


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    fails(prefix, "set.bin: no such file")
    build(prefix, np.uint16)
    index = prefix.with_suffix(".idx")
    content = index.read_bytes()
    header, sequences = 34, 6
    gap = bytearray(content)
    struct.pack_into("<q", gap, header + sequences * 4 + 8, 6)
    index.write_bytes(gap)
    fails(prefix, "set.idx: sequence 1 begins at byte 6, not at 4")
    short = bytearray(content)
    struct.pack_into("<q", short, len(content) - 8, 5)
    index.write_bytes(short)
    fails(prefix, "set.idx: its documents begin at sequence 0 and end at 5 of 6")
    index.write_bytes(content)
    prefix.with_suffix(".bin").write_bytes(b"\0" * 21)
    fails(prefix, "set.bin: 21 bytes, its index speaks of 22")


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    build(tmp_path / "set", np.float32)
    fails(tmp_path / "set", "dtype code 7")


def test_a_manifest_says_what_is_not_known(tmp_path: Path) -> None:
    build(tmp_path / "set", np.uint16)
    adopt(tmp_path / "set", ByteTokenizer())
    assert json.loads((tmp_path / "set.json").read_text())["source_bytes"] == 0

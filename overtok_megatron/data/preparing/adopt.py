"""A set that Megatron wrote, PREFIX.bin and PREFIX.idx, becomes one of ours: checked whole, then described by a manifest."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from overtok_megatron.data.index_file import check_index, read_index
from overtok_megatron.data.indexed import check_bin, map_tokens
from overtok_megatron.data.manifest import DatasetManifest, dataset_paths
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import DataError
from overtok_megatron.files import write_atomically

_STRIDE = 1 << 22  # tokens looked at at once


def adopt(
    prefix: str | Path, tokenizer: Tokenizer, advance: Callable[[int], object] = lambda size: None
) -> tuple[DatasetManifest, int]:
    """Write PREFIX.json for a set that `tokenizer` is said to have made; returns it and how many documents its eod_id ends.

    The files do not say which tokenizer made them; only that every token is in its vocabulary is checked. Raises DataError
    where the files are missing, damaged, contradict each other, have a manifest already, or hold another token.
    """
    bin_path, idx_path, manifest_path = dataset_paths(prefix)
    if os.path.lexists(manifest_path):
        raise DataError(f"{manifest_path}: is there already; remove it if the set is to be described anew")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file; name the prefix of a Megatron set, without .bin or .idx")
    index = read_index(idx_path)
    check_bin(bin_path, index.num_tokens, index.dtype)
    check_index(index, idx_path)
    tokens = map_tokens(bin_path, index.dtype)
    digest = hashlib.sha256()
    for begin in range(0, len(tokens), _STRIDE):
        part = tokens[begin : begin + _STRIDE]
        wrong = np.flatnonzero((part < 0) | (part >= tokenizer.vocab_size))
        if len(wrong):
            raise DataError(
                f"{bin_path}: token {begin + wrong[0]} is {part[wrong[0]]}, the tokenizer has ids 0 to "
                f"{tokenizer.vocab_size - 1}; it was made with another one"
            )
        digest.update(part.tobytes())
        advance(part.nbytes)
    ends = np.cumsum(index.document_lengths())
    ended = int((tokens[ends[ends > 0] - 1] == tokenizer.eod_id).sum())
    with idx_path.open("rb") as file:
        idx_digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = DatasetManifest(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        num_documents=index.num_documents,
        num_tokens=len(tokens),
        source_bytes=0,
        bin_sha256=digest.hexdigest(),
        idx_sha256=idx_digest,
    )
    try:
        write_atomically(manifest_path, json.dumps(asdict(manifest), indent=1))
    except OSError as error:
        raise DataError(
            f"{manifest_path}: cannot be written ({error.strerror}); link the two files into a folder of yours"
        ) from None
    return manifest, ended

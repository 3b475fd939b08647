"""Which files with the names of a dataset may be replaced: those of a set that we wrote, or that a killed call of ours left."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from overtok_megatron.data.manifest import dataset_paths, read_manifest
from overtok_megatron.data.partial_set import aside_paths, lengths_path
from overtok_megatron.errors import DataError, OutputError
from overtok_megatron.files import refuse_foreign, refuse_inputs

_JOURNAL_BEGIN = re.compile(rb'\{"version": \d+, "files": "')  # of its first line
_MANIFEST_BEGIN = b'{\n "vocab_size": '  # of a manifest, even of a damaged one


def journal_path(prefix: str | Path) -> Path:
    """The journal of a call that makes the sets of a prefix."""
    return Path(f"{prefix}.journal")


def output_paths(prefix: str | Path, sets: Sequence[str]) -> list[Path]:
    """Every file that a call may write for `sets`, which are of `prefix`."""
    parts = [path for name in sets for path in (*dataset_paths(name), *aside_paths(name), lengths_path(name))]
    return [journal_path(prefix), *parts]


def refuse_outputs(prefix: str, sets: Sequence[str], stale: Sequence[str], inputs: Sequence[Path]) -> None:
    """Raise OutputError where a call that reads `inputs` and writes `sets` would lose something.

    stale: sets of an earlier split of `prefix` that would stay, though their documents go to others now.
    """
    if not Path(prefix).name or prefix.endswith(os.sep):
        raise OutputError(
            f"--output: {prefix!r} names no file; write a folder and the beginning of names, as data/mine"
        )
    refuse_inputs(output_paths(prefix, sets), inputs)
    journal = journal_path(prefix)
    refuse_foreign(journal, _is_journal, "a journal of `overtok prepare`")
    under_way = _names_a_job(journal)
    for name in sets:
        *parts, manifest = dataset_paths(name)
        refuse_foreign(manifest, _is_manifest, "the manifest of a dataset that `overtok prepare` wrote")
        described = manifest.exists() or under_way  # parts without a manifest may be Megatron's
        for path in parts:
            refuse_foreign(path, described, "described by a manifest of `overtok prepare`")
        for path in (*aside_paths(name), lengths_path(name)):
            refuse_foreign(path, under_way, "part of a dataset that is being written, which has a journal")
    for name in stale:
        if dataset_paths(name)[2].exists():
            raise OutputError(
                f"{name}: is there from an earlier --split; its documents would be in the new sets as well: remove "
                f"{Path(name).name}.bin, .idx and .json, or name another --output"
            )


def abandoned_paths(prefix: str | Path, sets: Sequence[str], others: Sequence[str]) -> list[Path]:
    """What a killed call of `prefix` for other sets left, and what this call for `sets` removes: only the journal, which this
    call replaces, says that it is ours.

    others: what such a call may have written; those with a journal of their own are the work of another.
    """
    forgotten = [name for name in others if name not in sets and (name == prefix or not journal_path(name).exists())]
    return [path for name in forgotten for path in (*aside_paths(name), lengths_path(name))]


def _is_journal(path: Path) -> bool:
    return b'{"version": '.startswith(_head(path)) or _names_a_job(path)  # cut by a kill, or whole


def _names_a_job(path: Path) -> bool:
    return _JOURNAL_BEGIN.match(_head(path)) is not None


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(64)


def _is_manifest(path: Path) -> bool:
    try:
        return read_manifest(path).source_bytes > 0  # 0: `overtok adopt` described files of somebody else's
    except DataError:
        with path.open("rb") as file:
            return file.read(len(_MANIFEST_BEGIN)) == _MANIFEST_BEGIN

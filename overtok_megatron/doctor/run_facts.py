"""What a host reads of a run: its configuration, its tokenizer and datasets, and the output folder that all should share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate, validate_model
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.manifest import dataset_paths
from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.errors import OvertokError
from overtok_megatron.files import write_atomically
from overtok_megatron.launching.preparation import load_run
from overtok_megatron.launching.shared_folder import SEEN_WITHIN, sees_token
from overtok_megatron.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """keys: the configuration, value by dotted key. data: tokenizer and sets by name, with counts and digests.

    failures: what could not be read, a line each, by "configuration" or "data".
    """

    keys: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def checked_run(path: str, overrides: Sequence[str], world: int | None) -> RunConfig:
    """The configuration, checked; world: ranks of the run, None = not known. Raises ConfigError as `overtok train` does."""
    loaded = load_run(path, overrides, lambda _: None)
    if world is None:
        validate_model(loaded.config, loaded.locate)
    else:
        validate(loaded.config, world, loaded.locate)
    return loaded.config


def read_run(path: str, overrides: Sequence[str], world: int | None) -> tuple[RunConfig | None, RunFacts]:
    """The configuration as `checked_run` and what this host reads of it; None with a failure where it cannot be read."""
    try:
        config = checked_run(path, overrides, world)
    except OvertokError as error:
        return None, RunFacts(failures={"configuration": error.lines[0]})
    keys = dict(_flat(config.model_dump(mode="json"), ""))
    try:
        data = _data(config)
    except OvertokError as error:
        return config, RunFacts(keys=keys, failures={"data": error.lines[0]})
    return config, RunFacts(keys=keys, data=data)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def _data(config: RunConfig) -> dict[str, str]:
    """Tokenizer and sets in words. Files are not hashed again: their sizes are checked, digests are the manifests'."""
    opened = open_run_data(config)
    found = {f"tokenizer {opened.tokenizer_path}": _short(opened.tokenizer_fingerprint)}
    for dataset in [*(one.dataset for one in opened.train), *opened.validation.values()]:
        found[dataset.prefix] = _described(dataset)
    return found


def _described(dataset: IndexedDataset) -> str:
    manifest = dataset.manifest
    size = sum(path.stat().st_size for path in dataset_paths(dataset.prefix))
    return (
        f"{manifest.num_tokens:,} tokens in {manifest.num_documents:,} documents, {size:,} bytes, SHA-256 "
        f"{_short(manifest.bin_sha256)}"
    )


def _short(digest: str) -> str:
    return digest[:12]


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing while the block runs; afterwards remove what was made and not used. Raises OSError."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for one in missing:
            with suppress(OSError):
                one.rmdir()


def folder_failure(folder: Path, token: str, mark: str) -> str | None:
    """Why this host does not share the output folder, None where it does: it must read the token and write a file beside it.

    mark: of this host, part of its file's name.
    """
    if not sees_token(folder, token):
        return f"a file of the first host is not seen there within {SEEN_WITHIN:.0f} s; the folder must be shared"
    own = RunFolder(folder).start_token(f"{token}-{mark}")
    try:
        write_atomically(own, "")
        own.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return None

"""A run's tokenizer: kept in the run's folder when training starts, and found by its fingerprint wherever the run lies."""

import hashlib
from pathlib import Path

from overtok_megatron.config.moved_runs import candidate_paths
from overtok_megatron.config.schema import RunConfig, TokenizerConfig
from overtok_megatron.errors import CheckpointError, DataError
from overtok_megatron.files import write_atomically
from overtok_megatron.run_folder import TOKENIZER_FILES, RunFolder


def keep_tokenizer(section: TokenizerConfig, run: Path) -> None:
    """Copy the tokenizer's file into the folder of a run, where no file of that name is yet.

    Raises DataError where it cannot be read or written; no part of it is left.
    """
    if section.path is None:
        return
    source, target = _file(Path(section.path), section.type), RunFolder(run).tokenizer(section.type)
    if target.exists():  # this one, or another that is not ours to replace
        return
    try:
        write_atomically(target, source.read_bytes())
    except OSError as error:
        raise DataError(f"tokenizer {source}: cannot be copied to {target} ({error.strerror})") from None


def find_tokenizer(
    config: RunConfig, run: Path | None, fingerprint: str | None, given: Path | None = None
) -> TokenizerConfig:
    """The tokenizer section of a run with the path at which the run's tokenizer lies now.

    run: its folder, None = not known. fingerprint: SHA-256 of the right file, None = not known. given: a path that the user
    names, which alone is looked at. Raises CheckpointError where it is not found, or all that is there is another one.
    """
    section = config.tokenizer
    if section.path is None:
        if given is not None:
            raise CheckpointError(
                f"--tokenizer {given}: this model's tokens are bytes, which have no file; leave it out"
            )
        return section
    candidates = list(dict.fromkeys(candidate_paths(section.path, config, run)))
    if run is not None:
        candidates.insert(1, RunFolder(run).tokenizer(section.type))
    if given is not None:
        candidates = [given / TOKENIZER_FILES[section.type] if given.is_dir() else given]
    others = []
    for path in candidates:
        digest = _digest(_file(path, section.type))
        if digest is None:
            continue
        if fingerprint is None or digest == fingerprint:
            return section.model_copy(update={"path": str(path)})
        others.append((path, digest))
    wanted = "" if fingerprint is None else f" (SHA-256 {fingerprint[:12]})"
    if others:
        path, digest = others[0]
        raise CheckpointError(
            f"{path}: not the tokenizer that {run or 'the checkpoint'} was trained with (SHA-256 {digest[:12]}, expected "
            f"{(fingerprint or '')[:12]}); put the original back, or name it by --tokenizer"
        )
    seen = given or section.path
    raise CheckpointError(
        f"tokenizer {seen}: no such file"
        + ("" if run is None or given is not None else f", nor {RunFolder(run).tokenizer(section.type)}")
        + f"; name the run's tokenizer{wanted} by --tokenizer"
    )


def _file(path: Path, kind: str) -> Path:
    return path / TOKENIZER_FILES[kind] if path.is_dir() else path


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None

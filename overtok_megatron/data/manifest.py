"""PREFIX.json: what a dataset holds, which tokenizer made it, and the digests of its two other files."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from overtok_megatron.data.index_file import MEND
from overtok_megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Counts and identity of a dataset; digests SHA-256. source_bytes: of its text as UTF-8, 0 = not known."""

    vocab_size: int
    eod_id: int
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int
    source_bytes: int
    bin_sha256: str
    idx_sha256: str


def dataset_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """(tokens, index, manifest) of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def read_manifest(path: Path) -> DatasetManifest:
    """Read a manifest. Raises DataError where a field is missing, unknown or of another type."""
    try:
        manifest = DatasetManifest(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); ask its owner for access") from None
    except (ValueError, TypeError):
        raise DataError(f"{path}: not a dataset's manifest; {MEND}") from None
    for field in fields(manifest):
        value = getattr(manifest, field.name)
        assert isinstance(field.type, type)
        if type(value) is not field.type:
            raise DataError(f"{path}: {field.name} is {value!r}, not of type {field.type.__name__}; {MEND}")
    return manifest

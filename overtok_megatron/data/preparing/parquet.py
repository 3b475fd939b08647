"""Parquet files as batches of the values of one column. pyarrow is optional: it is imported at the first such file."""

from collections.abc import Iterator
from pathlib import Path

from overtok_megatron.errors import DataError

_ROWS = 256  # of a batch


def parquet_rows(path: Path, column: str, skip: int = 0) -> Iterator[tuple[list[object], int]]:
    """Values from row `skip` on, batch by batch, each with the number of rows of the file.

    Memory is that of a row group. Raises DataError, one line, where pyarrow is absent, the file damaged or cut, or the
    column missing or not of text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs the package pyarrow; pip install pyarrow") from None
    row = 0
    try:
        # By a handle: pyarrow takes names for addresses, and those that are not UTF-8 for nothing at all.
        with path.open("rb") as handle, pyarrow.parquet.ParquetFile(handle) as file:
            schema, total = file.schema_arrow, file.metadata.num_rows
            if column not in schema.names:
                raise DataError(f"{path}: has no column {column!r}; its columns are {', '.join(schema.names)} (--key)")
            kind = schema.field(column).type
            text = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(text) or pyarrow.types.is_large_string(text)):
                raise DataError(f"{path}: column {column!r} is of type {kind}, not text; name another one (--key)")
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= skip:
                    row += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column]):
                    values = batch.column(0).to_pylist()
                    kept = values[max(0, skip - row) :]
                    row += len(values)
                    if kept:
                        yield kept, total
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 in rows {row} to {row + _ROWS - 1} of {column!r}; write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0][:200]
        raise DataError(f"{path}: damaged or cut short at row {row} ({reason}); fetch it again") from None

"""Keys, values and tokens of the sequences that are being decoded, one sequence per row.

A sequence lies in consecutive columns of its row: `lengths[row]` tokens, the last of them before column `ends[row]`. The rows
of a left-padded batch all end at one column, and new keys are then written as one slice. `crop` may leave rows that end at
different columns; each is then written at columns of its own. Deliberately not here: masks and positions, which depend on the
model that decodes (see `IncrementalDecoder`).

Shapes: b rows of the cache, k rows of a call (the first ones), s new tokens of a call, c columns, g key/value heads,
e head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from overtok_megatron.ngram.ids import MISSING
from overtok_megatron.parallel.uploading import moved


class KVCache:
    """What was fed so far: `keys` and `values`, one [b, g, c, e] per layer, and `tokens` [b, c] int64.

    `append` takes new tokens, then each layer calls `write` with theirs. In `tokens`, MISSING stands in the columns before a
    sequence; the columns after it may hold anything.
    """

    def __init__(
        self,
        *,
        batch: int,
        columns: int,
        num_layers: int,
        num_key_value_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def empty() -> list[Tensor]:
            shape = (batch, num_key_value_heads, columns, head_size)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        self.keys, self.values = empty(), empty()
        self.tokens = torch.full((batch, columns), MISSING, dtype=torch.int64, device=device)
        self.lengths = [0] * batch
        self.ends = [0] * batch
        self._new = torch.zeros((1, 0), dtype=torch.int64, device=device)  # columns of the tokens appended last

    def append(self, tokens: Tensor) -> Tensor:
        """Append tokens [k, s] int64 to the first k sequences: the columns that they take, int64 [1 or k, s].

        MISSING is padding, allowed only before the first token of a sequence.
        """
        rows, count = tokens.shape
        assert max(self.ends[:rows]) + count <= self.tokens.shape[1], "the cache is full"
        added = [count] * rows
        if not all(self.lengths[:rows]):  # only these may bring padding: counting it waits for the device
            added = (tokens >= 0).sum(dim=1).tolist()
        self.lengths[:rows] = [length + new for length, new in zip(self.lengths, added, strict=False)]
        self.ends[:rows] = [end + count for end in self.ends[:rows]]
        self._new = self._last_columns(rows, count)
        if len(self._new) == 1:
            self.tokens[:rows, self.ends[0] - count : self.ends[0]] = tokens
        else:
            self.tokens[:rows].scatter_(1, self._new, tokens)
        return self._new

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [k, g, s, e] of the tokens appended last: those of all columns in use, [k, g, c, e]."""
        rows, _, count, _ = keys.shape
        end = max(self.ends[:rows])
        stored = self.keys[layer][:rows, :, :end], self.values[layer][:rows, :, :end]
        for cache, new in zip(stored, (keys, values), strict=True):
            if len(self._new) == 1:
                cache[:, :, end - count :] = new
            else:
                cache.scatter_(2, self._new[:, None, :, None].expand_as(new), new)
        return stored

    def fed(self, rows: int) -> Tensor:
        """Tokens of the first rows in the columns in use, [k, c]."""
        return self.tokens[:rows, : max(self.ends[:rows])]

    def history(self, rows: int, count: int) -> Tensor:
        """The last `count` tokens of each of the first rows, [k, count]; MISSING stands before a sequence's first token."""
        if len(set(self.ends[:rows])) == 1 and self.ends[0] >= count:
            return self.tokens[:rows, self.ends[0] - count : self.ends[0]]
        columns = self._last_columns(rows, count).expand(rows, count)
        return self.tokens[:rows].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, MISSING)

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep only the first `lengths[row]` tokens of each of the first rows, as if the others had never been fed."""
        for row, length in enumerate(lengths):
            dropped = self.lengths[row] - length
            assert 0 <= dropped <= self.lengths[row]
            self.lengths[row], self.ends[row] = length, self.ends[row] - dropped

    def copy_row(
        self, source_row: int, target_row: int, source: "KVCache | None" = None, *, end: int | None = None
    ) -> None:
        """Put a copy of one sequence in place of another.

        source: the cache that it is in, None = this one. end: the column at which the copy ends, None = as in the source.
        """
        source = self if source is None else source
        assert source is not self or source_row != target_row
        length, source_end = source.lengths[source_row], source.ends[source_row]
        end = source_end if end is None else end
        assert length <= end
        old, new = slice(source_end - length, source_end), slice(end - length, end)
        for ours, theirs in zip(self.keys + self.values, source.keys + source.values, strict=True):
            ours[target_row, :, new] = theirs[source_row, :, old]
        self.tokens[target_row] = MISSING
        self.tokens[target_row, new] = source.tokens[source_row, old]
        self.lengths[target_row], self.ends[target_row] = length, end

    def clear_row(self, row: int) -> None:
        """Forget one sequence."""
        self.lengths[row] = self.ends[row] = 0

    def move(self, rows: int, columns: int) -> None:
        """Move the first rows by `columns` columns, to the right where it is positive, else to the left."""
        start = min((end - length for end, length in zip(self.ends, self.lengths[:rows], strict=False)), default=0)
        end = max(self.ends[:rows], default=0)
        assert start + columns >= 0 and end + columns <= self.tokens.shape[1]
        for cache in self.keys + self.values:
            cache[:rows, :, start + columns : end + columns] = cache[:rows, :, start:end].clone()
        tokens = self.tokens[:rows, start:end].clone()
        self.tokens[:rows] = MISSING
        self.tokens[:rows, start + columns : end + columns] = tokens
        self.ends[:rows] = [end + columns for end in self.ends[:rows]]

    def _last_columns(self, rows: int, count: int) -> Tensor:
        """The last `count` columns of each of the first rows, int64 [k, count]; [1, count] where all rows end together."""
        ends, device = self.ends[:rows], self.tokens.device
        if len(set(ends)) == 1:
            return torch.arange(ends[0] - count, ends[0], device=device).unsqueeze(0)
        return moved(torch.tensor(ends), device).unsqueeze(1) + torch.arange(-count, 0, device=device)

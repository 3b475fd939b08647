"""An over-encoded language model for transformers: a family's own model, whose input embedding has hashed n-grams joined to it.

This file lies beside the weights and needs torch, transformers (4.57, or 5) and safetensors only. The n-gram tables are in
`tables-*.safetensors`, listed in `tables.index.json`. `table_storage` of the configuration, or of from_pretrained, says where
their rows are kept:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, table_storage="mapped")

"device": beside the word embedding. "cpu": in host memory, whatever device the model is on. "mapped": in the files, read by
position as they are needed, so that memory does not depend on the size of the tables. Rows are not trained here.

Shapes: b batch, s new tokens, n longest n-gram, T tables, w row width, d hidden.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn

_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if not (4, 57) <= _RELEASE < (6, 0):  # before the next import, which fails in an older one without saying why
    raise ImportError(
        f"transformers {transformers.__version__} is installed; this model is computed by 4.57 or later, below 6.0"
    )

from transformers import (  # noqa: E402
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)
from transformers.utils import cached_file  # noqa: E402

INDEX = "tables.index.json"
_MISSING = -1  # stands for "no token here": before a sequence begins, left padding
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}
_STORAGES = ("device", "cpu", "mapped")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class _Released:
    """Mixed into a family's configuration: refuses releases of transformers that would compute something else of it."""

    transformers_releases: list | None = None  # spans: from one on, below the other

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        spans = config_dict.get("transformers_releases") or [("4.57", "6.0")]
        if not any(_release(first) <= _RELEASE < _release(end) for first, end in spans):
            wanted = ", or ".join(f"{first} or later, below {end}" for first, end in spans)
            raise ImportError(
                f"transformers {transformers.__version__} is installed, and would compute something else than this model "
                f"({config_dict.get('model_type')}) does; install {wanted}"
            )
        return super().from_dict(config_dict, **kwargs)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


class OvertokLlamaConfig(_Released, LlamaConfig):
    model_type = "overtok_llama"
    over_encoding: dict | None = None
    overtok: dict | None = None
    table_storage: str = "device"


class OvertokOlmo2Config(_Released, Olmo2Config):
    model_type = "overtok_olmo2"
    over_encoding: dict | None = None
    overtok: dict | None = None
    table_storage: str = "device"


class OvertokOlmo3Config(_Released, Olmo3Config):
    model_type = "overtok_olmo3"
    over_encoding: dict | None = None
    overtok: dict | None = None
    table_storage: str = "device"


class OvertokOlmoeConfig(_Released, OlmoeConfig):
    model_type = "overtok_olmoe"
    over_encoding: dict | None = None
    overtok: dict | None = None
    table_storage: str = "device"


class RowsInMemory:
    """All rows in one tensor [rows, w], with a scale each where they are int8."""

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        self.weight = weight
        self.scale = scale

    def read(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows index [r] int64, on any device -> [r, w] of a dtype, where the rows are."""
        index = index.to(self.weight.device)
        values = self.weight.index_select(0, index)
        if self.scale is not None:
            values = values.float() * self.scale.index_select(0, index).unsqueeze(1)
        return values.to(dtype)


class RowsInFiles:
    """Rows left in their safetensors files: a header's length (u64), a JSON header, the data."""

    def __init__(self, files: list[tuple[str, int, int]]) -> None:
        """files: (path, first row, end), in order."""
        self.starts = torch.tensor([start for _, start, _ in files])
        self.columns: list[dict[str, tuple[int, int, torch.dtype, list[int]]]] = []
        for path, _, _ in files:
            handle = os.open(path, os.O_RDONLY)  # for as long as the process lives
            (length,) = struct.unpack("<Q", os.pread(handle, 8, 0))
            header = json.loads(os.pread(handle, length, 8))
            self.columns.append(
                {
                    name: (handle, 8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry["shape"][1:])
                    for name, entry in header.items()
                    if name != "__metadata__"
                }
            )

    def _column(self, number: int, name: str, rows: list[int]) -> Tensor:
        handle, begin, dtype, shape = self.columns[number][name]
        size = dtype.itemsize * (shape[0] if shape else 1)
        parts = [os.pread(handle, size, begin + size * row) for row in rows]
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).view(len(rows), *shape)

    def read(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows index [r] int64, ascending -> [r, w] of a dtype, on the CPU."""
        index = index.cpu()
        owner = torch.searchsorted(self.starts, index, right=True) - 1
        parts = []
        for number in owner.unique().tolist():
            rows = (index[owner == number] - self.starts[number]).tolist()
            values = self._column(number, "weight", rows)
            if "scale" in self.columns[number]:
                values = values.float() * self._column(number, "scale", rows).unsqueeze(1)
            parts.append(values.to(dtype))
        return torch.cat(parts)


class OverEncoding(nn.Module):
    """Hashes n-grams, looks their rows up, projects them, and joins them to the word embedding."""

    def __init__(self, hidden_size: int, settings: dict) -> None:
        super().__init__()
        self.orders: list[int] = settings["orders"]  # the n-gram length of each table
        self.sizes: list[int] = settings["sizes"]  # rows of each table
        self.width: int = settings["row_width"]
        self.base: int = settings["hash_base"]
        self.pad_id: int = settings["pad_id"]
        self.eod_id: int | None = settings["eod_id"] if settings["boundary"] == "reset" else None
        self.combine: str = settings["combine"]
        self.groups: dict[str, int] = settings["projections"]  # name of a projection -> how many tables it takes
        self.stripes: int = settings["stripes"]
        self.scatter: int = settings["scatter"]
        for name, tables in self.groups.items():
            self.register_parameter(name, nn.Parameter(torch.empty(hidden_size, tables * self.width)))
        self.store: RowsInMemory | RowsInFiles | None = None

    @property
    def reach(self) -> int:
        """How many tokens before its own a position needs: n - 1."""
        return max(self.orders) - 1

    def windows(self, extended: Tensor) -> list[Tensor]:
        """x_t, x_{t-1}, .., x_{t-n+1} of extended [b, n-1+s], each [b, s]; the pad id where there is no such token."""
        length = extended.shape[-1] - self.reach
        visible = torch.ones_like(extended[..., self.reach :], dtype=torch.bool)
        result = []
        for back in range(self.reach + 1):
            token = extended.narrow(-1, self.reach - back, length)
            present = token >= 0
            if back > 0 and self.eod_id is not None:  # nothing behind the end of the document before
                visible = visible & present & (token != self.eod_id)
                present = visible
            result.append(torch.where(present, token, self.pad_id))
        return result

    def places(self, extended: Tensor) -> Tensor:
        """Where the rows of all n-grams lie, [b, s, T] int64; extended [b, n-1+s]: the tokens with those before them."""
        windows = self.windows(extended)
        found = []
        for table, (order, rows) in enumerate(zip(self.orders, self.sizes, strict=True)):
            row = torch.zeros_like(windows[0])
            for token in reversed(windows[:order]):  # Horner, reduced at each step: the polynomial passes 64 bits
                row = (row * (self.base % rows) + token) % rows
            found.append(self._place(table, row))
        return torch.stack(found, dim=-1)

    def _place(self, table: int, row: Tensor) -> Tensor:
        """Rows are counted across the tables and dealt into heaps, which lie one after the other."""
        smallest = min(self.sizes)
        beyond = sum(size - smallest for size in self.sizes[:table]) + len(self.sizes) * smallest - smallest
        count = torch.where(row < smallest, row * len(self.sizes) + table, row + beyond)
        length = sum(self.sizes) // self.stripes
        heap = count % self.stripes * self.scatter % self.stripes
        return torch.where(count < length * self.stripes, heap * length + count // self.stripes, count)

    def forward(self, embedded: Tensor, extended: Tensor) -> Tensor:
        """embedded [b, s, d], extended [b, n-1+s] -> [b, s, d]."""
        if self.store is None:
            raise ValueError("the n-gram tables are not loaded; use from_pretrained with the folder that holds them")
        places, inverse = self.places(extended).unique(return_inverse=True)
        rows = self.store.read(places, embedded.dtype).to(embedded.device)[inverse.to(embedded.device)]  # [b, s, T, w]
        total = None
        for name, part in zip(self.groups, rows.split(list(self.groups.values()), dim=-2), strict=True):
            own = F.linear(part.flatten(-2).contiguous(), getattr(self, name))
            total = own if total is None else total + own
        share = 1.0 / (1 + next(iter(self.groups.values())))
        if self.combine == "sum":
            return embedded + total
        if self.combine == "mean":
            return (embedded + total) * share
        return torch.add(embedded, total, alpha=share)


class _History:
    """What a key/value cache becomes a part of here: it keeps the token ids as well, through all that is done to it."""

    token_history: Tensor  # [b, positions] int64, -1 for padding

    def _follow(self) -> None:
        self.token_history = self.token_history[:, : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.token_history = self.token_history.index_select(0, beam_idx.to(self.token_history.device))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._follow()

    def reset(self) -> None:
        super().reset()
        self.token_history = self.token_history[:, :0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.token_history = self.token_history.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.token_history = self.token_history[indices, ...]


_WITH_HISTORY: dict[type, type] = {}


def remember(cache: Any, tokens: Tensor) -> Tensor:
    """Append tokens [b, s] to those that a cache knows; returns all of them. Raises ValueError where it knows too few."""
    known = getattr(cache, "token_history", None)
    if known is None:
        if cache.get_seq_length() > 0:
            raise ValueError("past_key_values: made without this model's n-gram history; give input_ids from the start")
        kind = type(cache)
        if kind not in _WITH_HISTORY:
            _WITH_HISTORY[kind] = type(f"{kind.__name__}WithHistory", (_History, kind), {})
        cache.__class__ = _WITH_HISTORY[kind]
        known = tokens[:, :0]
    elif known.shape[1] != cache.get_seq_length():  # a static cache that was reset by filling it anew
        known = known[:, : cache.get_seq_length()]
    cache.token_history = torch.cat([known.to(tokens.device), tokens], dim=1)
    return cache.token_history


class OverEncoded:
    """Mixed into a family's model for causal language modelling."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.table_storage not in _STORAGES:
            raise ValueError(f"table_storage: {config.table_storage}; one of {', '.join(_STORAGES)}")
        self.over_encoding = OverEncoding(config.hidden_size, config.over_encoding)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_tables(lambda name: cached_file(pretrained_model_name_or_path, name, **hub))
        return loaded

    def load_tables(self, find: Callable[[str], str]) -> None:
        """Open the tables as config.table_storage says; find: the path of one of the folder's files."""
        with open(find(INDEX), encoding="utf-8") as file:
            index = json.load(file)
        files = [(find(name), start, stop) for name, start, stop in index["files"]]
        rows = sum(self.over_encoding.sizes)
        if not files or files[-1][2] != rows:
            raise ValueError(f"{INDEX}: the tables' files hold {files[-1][2] if files else 0} of {rows} rows")
        self._table_files = [find(INDEX), *(path for path, _, _ in files)]
        if self.config.table_storage == "mapped":
            self.over_encoding.store = RowsInFiles(files)
            return
        home = self.get_input_embeddings().weight.device
        device = torch.device("cpu") if self.config.table_storage == "cpu" else home
        columns: dict[str, Tensor] = {}
        for path, start, stop in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    values = file.get_tensor(name)
                    if name not in columns:
                        columns[name] = torch.empty(rows, *values.shape[1:], dtype=values.dtype, device=device)
                    columns[name][start:stop] = values
        self.over_encoding.store = RowsInMemory(columns["weight"], columns.get("scale"))

    def _apply(self, function: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Rows beside the model go where it goes; their dtype stays."""
        result = super()._apply(function, *args, **kwargs)
        store = getattr(getattr(self, "over_encoding", None), "store", None)
        if isinstance(store, RowsInMemory) and self.config.table_storage == "device":
            device = self.get_input_embeddings().weight.device
            store.weight = store.weight.to(device)
            store.scale = None if store.scale is None else store.scale.to(device)
        return result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with the tables' files beside the weights."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        for path in getattr(self, "_table_files", []):
            target = os.path.join(save_directory, os.path.basename(path))
            if os.path.realpath(path) != os.path.realpath(target):
                shutil.copyfile(path, target)
        return result

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the family's. attention_mask: two-dimensional, 0 where left padding stands."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds: n-grams are of token ids; give input_ids")
        tokens = input_ids
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
                raise ValueError("attention_mask: must be [batch, positions], to tell padding from text")
            present = attention_mask[:, -input_ids.shape[1] :].to(input_ids.device) != 0
            tokens = torch.where(present, input_ids, _MISSING)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        known = tokens if past_key_values is None else remember(past_key_values, tokens)
        reach, length = self.over_encoding.reach, tokens.shape[1]
        before = F.pad(known, (reach, 0), value=_MISSING)[:, -(reach + length) :]
        embedded = self.over_encoding(self.get_input_embeddings()(input_ids), before)
        return super().forward(
            input_ids=None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embedded,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


class OvertokLlamaForCausalLM(OverEncoded, LlamaForCausalLM):
    config_class = OvertokLlamaConfig


class OvertokOlmo2ForCausalLM(OverEncoded, Olmo2ForCausalLM):
    config_class = OvertokOlmo2Config


class OvertokOlmo3ForCausalLM(OverEncoded, Olmo3ForCausalLM):
    config_class = OvertokOlmo3Config


class OvertokOlmoeForCausalLM(OverEncoded, OlmoeForCausalLM):
    config_class = OvertokOlmoeConfig

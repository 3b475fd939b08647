"""`benchmark.py tables` and `benchmark.py mapped`: the n-gram tables against their peers, and read from a file."""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import alternate, configuration
from memory_budget import Budget, held
from table_contenders import Needs, fbgemm_tables, has_fbgemm, limit, our_tables, row_ids, torch_tables
from torch import Tensor

from overtok_megatron.checkpoint.rows_on_disk import RowsOnDisk
from overtok_megatron.checkpoint.table_file import FOLDER, TableFile
from overtok_megatron.checkpoint.tables import write_rows
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.tokenizers.loading import configured_tokenizer
from overtok_megatron.inference.generation import generate_tokens
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import HashTables, RowKernels
from overtok_megatron.model.assembly import build_transformer
from overtok_megatron.ngram.building import build_family, build_table_reader, row_space
from overtok_megatron.ngram.row_space import RowSpace
from overtok_megatron.ngram.row_store import RowReader, RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.parallel.devices import synchronize
from overtok_megatron.training.measuring import peak_memory

_PART = 2**22  # rows per file


def text_rows(options: argparse.Namespace, size: int) -> Tensor:
    """Rows [tokens, 4] of the n-grams of real text in four tables, two of 2-grams and two of 3-grams."""
    dataset = IndexedDataset(options.data)
    count = options.tokens // 128
    text = torch.stack([torch.from_numpy(dataset.tokens(index * 128, 128).astype("int64")) for index in range(count)])
    extended = torch.cat([text.new_full((count, 2), -1), text], dim=1)
    columns = [
        RowKernels().ngram_row_ids(
            extended[:, 3 - order :],
            HashTables(orders=(order,), sizes=(size - odd,), base=8192, pad_id=0, reset=False, eod_id=0, stripes=1),
        )
        for order, odd in ((2, 7), (2, 5), (3, 3), (3, 1))
    ]
    return torch.cat(columns, dim=-1).flatten(0, 1)


def table_case(
    options: argparse.Namespace, size: int, width: int, rows: Tensor, budget: Budget
) -> dict[str, Any] | None:
    """Every contender's seconds on one set of rows, with rates per row and byte; None where not even our tables fit.

    Peers that are too big to be in memory beside all others are timed in turn with ours alone; each ratio comes from one
    alternation.
    """
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=size - 7, width=width)
    device = rows.device
    distinct = sum(column.unique().numel() for column in rows.unbind(1))
    need = Needs(space.total_rows, width, rows.numel(), distinct)
    budget.begin()
    dtype = torch.float32 if budget.fits(need.ours(torch.float32)) else torch.bfloat16
    first = "ours" if dtype == torch.float32 else "ours, bf16"
    if not budget.take(first, need.ours(dtype)):
        return None
    grad = torch.randn(*rows.shape, width, device=device)

    def ours(dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], ShardedTables]:
        name = "ours" if dtype == torch.float32 else "ours, bf16"
        values = grad if dtype == torch.float32 else grad.to(dtype)
        step, made = our_tables(rows, space, values, dtype)
        return {name: step, f"limit{name[4:]}": limit(made, rows, space, values)}, made

    contenders, made = ours(dtype)
    beside = 0
    if dtype == torch.float32 and budget.take("ours, bf16", need.ours(torch.bfloat16)):
        contenders |= ours(torch.bfloat16)[0]
        beside += need.ours(torch.bfloat16)
    if has_fbgemm() and budget.take("fbgemm", need.fbgemm()):
        contenders |= fbgemm_tables(rows, size, grad)
        beside += need.fbgemm()
    seconds = alternate(contenders, options.rounds, device)
    times_first = {name: value / seconds[first] for name, value in seconds.items()}
    own = contenders[first]
    contenders.clear()
    budget.give_back(beside)
    held(device)  # gives back what they held
    for name, sparse, size_up_to in (("SparseAdam", True, 2**62), ("AdamW", False, 2**options.dense_up_to)):
        if width <= 64 and size <= size_up_to and budget.take(name, need.torch_tables(sparse=sparse)):
            pair = alternate({first: own, name: torch_tables(rows, size, grad, sparse=sparse)}, options.rounds, device)
            seconds[name], times_first[name] = pair[name], pair[name] / pair[first]
            budget.give_back(need.torch_tables(sparse=sparse))
            held(device)
    moved = width * (dtype.itemsize * (2 * rows.numel() + 3 * distinct) + 4 * 3 * distinct)
    fetched = made.fetch_row_ids(row_ids(rows, space), training=True)  # once more by hand, to time the update alone
    gradients = made.reduce_gradients(fetched, 1.0)
    synchronize(device)
    begin = time.perf_counter()
    made.update_rows(gradients, 0.01, 1.0)
    synchronize(device)
    update_seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "times_first": times_first,
        "share_of_limit": {name: seconds["limit" + name[4:]] / seconds[name] for name in seconds if name[:4] == "ours"},
        "distinct_share": distinct / rows.numel(),
        "rows_per_second": rows.numel() / seconds[first],
        "gigabytes_per_second": moved / seconds[first] / 1e9,
        "optimizer_nanoseconds_per_row": update_seconds / distinct * 1e9,
        "left_out_bytes": dict(budget.left_out),
    }


def tables(options: argparse.Namespace) -> dict[str, Any]:
    """Forward, backward and update of look-ups in four tables: ours, the peers, and the machine's limit."""
    cases: dict[str, Any] = {}
    budget = Budget(options.memory, options.device)
    for width in options.widths:
        for power in options.powers:
            size = 2**power
            uniform = torch.randint(0, size - 7, (options.tokens, 4))
            for kind, rows in (("text", text_rows(options, size)), ("uniform", uniform)):
                title = f"w {width}, 2^{power}, {kind}"
                case = table_case(options, size, width, rows.to(options.device), budget)
                if budget.left_out:
                    print(f"{title}: {budget.words()}", flush=True)
                if case is None:
                    continue
                cases[title] = case
                times = "  ".join(
                    f"{name} {1e3 * value:.1f} ({case['times_first'][name]:.2f} x)"
                    for name, value in case["seconds"].items()
                )
                share = case["distinct_share"]
                print(f"w {width:3}  2^{power}  {kind:7}  {share:.0%} distinct  ms: {times}", flush=True)
    if options.png:
        draw(cases, options)
    return {"tokens": options.tokens, "cases": cases}


def draw(cases: dict[str, Any], options: argparse.Namespace) -> None:
    """Milliseconds over rows of a table, a panel for each width and kind of ids."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(options.widths), 7), layout="constrained")
    axes = figure.subplots(2, len(options.widths), squeeze=False, sharex=True)
    for column, width in enumerate(options.widths):
        for row, kind in enumerate(("text", "uniform")):
            panel = axes[row][column]
            lines: dict[str, list[tuple[int, float]]] = {}
            for power in options.powers:
                case = cases.get(f"w {width}, 2^{power}, {kind}", {"seconds": {}})
                for name, seconds in case["seconds"].items():
                    lines.setdefault(name, []).append((power, 1e3 * seconds))
            for name, points in lines.items():
                panel.plot(*zip(*points, strict=True), "o-", label=name, linestyle="--" if "limit" in name else "-")
            panel.set(
                title=f"{kind} ids, w = {width}", yscale="log", ylabel="ms per step", xlabel="log2 of rows per table"
            )
            panel.legend(fontsize=7)
    figure.savefig(options.png, dpi=120)


def _synthetic_rows(folder: Path, config: RunConfig) -> None:
    """Random bfloat16 rows in the files of a checkpoint's tables."""
    space = row_space(config.model, config.over_encoding)
    for start in range(0, space.total_rows, _PART):
        stop = min(start + _PART, space.total_rows)
        values = torch.empty(stop - start, space.width).uniform_(-0.03, 0.03).to(torch.bfloat16)
        touched = torch.ones(stop - start, dtype=torch.uint8)
        write_rows(folder, TableFile.full(start, stop), {"weight": values, "touched": touched}, steps=0)


def _made_model(config: RunConfig, store: RowReader, device: torch.device) -> TrainedModel:
    torch.manual_seed(0)
    kernels = choose_kernels(config.training.kernels, device)
    model = build_transformer(config, device=device, kernels=kernels, eod_id=0).eval()
    tables = build_table_reader(config, build_family(config, 0, kernels.rows), store, device=device, kernels=kernels)
    tokenizer = configured_tokenizer(config.tokenizer)
    return TrainedModel(config=config, model=model, tables=tables, tokenizer=tokenizer, step=0)


def _rows_on_disk(folder: Path, config: RunConfig) -> RowsOnDisk:
    space = row_space(config.model, config.over_encoding)
    return RowsOnDisk(folder, space.total_rows, space.width, RowKernels())


def _continuation(trained: TrainedModel, prompts: list[list[int]], new: int) -> Callable[[], list[list[int]]]:
    return lambda: generate_tokens(trained, prompts, Sampling(max_new_tokens=new, temperature=1.0))


def _from_cold_files(
    folder: Path, config: RunConfig, prompts: list[list[int]], new: int, device: torch.device
) -> dict[str, float]:
    """In a process of its own: what it grows by beyond the dense model, and its seconds with no row in the page cache."""
    store = _rows_on_disk(folder, config)
    for path in (folder / FOLDER).iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    trained = _made_model(config, store, device)
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    _continuation(trained, prompts, new)()
    return {
        "cold_seconds": time.perf_counter() - begin,
        "bytes_above_dense": max(0, peak_memory(torch.device("cpu")) - before),
    }


def mapped(options: argparse.Namespace) -> dict[str, Any]:
    """Generation with the rows left in a file, and with the same rows in memory."""
    config = configuration(
        [
            f"over_encoding.table_rows={options.rows // 4 - 3}",
            "over_encoding.collision_check=warn",
            "model.hidden_size=256",
            "model.num_attention_heads=4",
            "model.intermediate_size=688",
        ],
        options.data,
    )
    space = row_space(config.model, config.over_encoding)
    text = IndexedDataset(options.data)
    prompts = [text.tokens(100 * number, 32).tolist() for number in range(options.batch)]
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        _synthetic_rows(folder, config)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            cold = pool.submit(_from_cold_files, folder, config, prompts, options.new, options.device).result()
        kernels = choose_kernels("auto", options.device).rows
        memory = RowStore(
            0,
            space.total_rows,
            space.width,
            std=0.0,
            seed=0,
            device=options.device,
            dtype=torch.bfloat16,
            kernels=kernels,
        )
        on_disk = _rows_on_disk(folder, config)
        for start in range(0, space.total_rows, 2**16):
            part = torch.arange(start, min(start + 2**16, space.total_rows))
            memory.rows.weight[start : start + len(part)] = on_disk.read(part, torch.bfloat16).to(options.device)
        contenders = {
            name: _continuation(_made_model(config, store, options.device), prompts, options.new)
            for name, store in (("mapped", on_disk), ("memory", memory))
        }
        assert contenders["mapped"]() == contenders["memory"]()
        seconds = alternate(contenders, options.rounds, options.device)
    tokens = options.batch * options.new
    return {
        "rows": space.total_rows,
        "table_bytes": space.total_rows * space.width * 2,
        "bytes_above_dense": cold["bytes_above_dense"],
        "tokens_per_second": {name: tokens / value for name, value in seconds.items()}
        | {"mapped, cold": tokens / cold["cold_seconds"]},
        "memory_over_mapped": seconds["memory"] / seconds["mapped"],
    }

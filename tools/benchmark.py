"""Measured speed, contenders alternating in one process: `dense`, `rows`, `tables`, `saves`. Ratios of medians are the figures.

dense: the baseline model's training step against Hugging Face's Olmo2ForCausalLM of the same shape.
rows: an over-encoded training step at growing table sizes; flat is the aim, since cost follows tokens.
tables: look-up, backward and update in four tables against fbgemm, SparseAdam, AdamW and the memory traffic alone.
saves: what a checkpoint of big tables costs training, blocking, in the background, and of the rows changed in ten steps.
Each states its physical limit: the matrix products alone, at the speed of one large product on the same threads.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table_contenders import fbgemm_tables, limit, our_tables, places, torch_tables
from torch import Tensor

from overtok_megatron.config.counts import flops_per_token
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.batches import TrainBatches
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.errors import DataError, OvertokError
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import HashTables, RowKernels
from overtok_megatron.launch import free_port, process_environment
from overtok_megatron.model.assembly import build_transformer
from overtok_megatron.ngram.sizing import RowSpace
from overtok_megatron.training.metrics import matmul_rate, peak_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def configuration(overrides: list[str], data: str) -> RunConfig:
    """The quickstart's over-encoded configuration with overrides; only its shape matters here."""
    path = Path(__file__).parent.parent / "configs" / "quickstart_overtok.yaml"
    return load_config(path, [f"data.train={data}", "training.output_directory=unused", *overrides]).config


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after two warm-up rounds, in turn: the machine's drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def hugging_face_step(config: RunConfig, batch: Tensor) -> Callable[[], object]:
    """A plain loop's step: forward with labels, backward, AdamW."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    shape = config.model
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            rms_norm_eps=shape.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            pad_token_id=None,
            eos_token_id=0,
            use_cache=False,
        )
    )
    model.to(device=DEVICE, dtype=torch.bfloat16)  # type: ignore[call-arg]  # a decorated method in transformers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs = batch[:, :-1]

    def step() -> None:
        model(inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(config: RunConfig, batch: Tensor) -> Callable[[], object]:
    """The same plain loop around this project's model."""
    model = build_transformer(config, device=DEVICE)
    optimizer = choose_kernels(config.training.kernels, DEVICE).adamw(
        [{"params": list(model.parameters())}], 1e-3, (0.9, 0.999), 1e-8
    )
    inputs, targets = batch[:, :-1], batch[:, 1:]

    def step() -> None:
        objective, _ = model(inputs, None, targets)
        (objective / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense(options: argparse.Namespace) -> dict[str, Any]:
    shape = [
        "over_encoding.enabled=false", "model.hidden_size=256", "model.intermediate_size=688", "model.num_layers=6",
        "model.num_attention_heads=4", "model.vocab_size=8192", "data.seq_length=256",
    ]  # fmt: skip
    config = configuration(shape, options.data)
    batch = torch.randint(0, 8192, (32, 257), device=DEVICE)
    seconds = alternate(
        {"overtok": our_step(config, batch), "transformers": hugging_face_step(config, batch)}, options.rounds
    )
    limit = flops_per_token(config) * 32 * 256 / matmul_rate(DEVICE, torch.bfloat16)
    return {
        "seconds": seconds,
        "ratio": seconds["transformers"] / seconds["overtok"],
        "limit_seconds": limit,
        "share_of_limit": limit / seconds["overtok"],
    }


def trainer_step(config: RunConfig, tokens: list[Tensor]) -> Callable[[], object]:
    """Whole optimizer steps through DeepSpeed, a new batch each time."""
    from overtok_megatron.training.engine import TrainingEngine, start_processes

    trainer = TrainingEngine(config, start_processes(config), DEVICE, eod_id=0)
    turn = iter(range(10**9))
    return lambda: trainer.step(tokens[next(turn) % len(tokens)], 1e-3)


def single_process() -> None:
    """What a launcher would put into the environment for one rank."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def rows(options: argparse.Namespace) -> dict[str, Any]:
    single_process()
    dataset = IndexedDataset(options.data)
    contenders = {}
    for power in options.powers:
        config = configuration(
            ["over_encoding.init_std=0.02", f"over_encoding.table_rows={2**power}", "over_encoding.collision_check=warn",
             "training.global_batch_size=32", "training.micro_batch_size=32"], options.data
        )  # fmt: skip
        batches = TrainBatches(dataset, config.data.seq_length, 32, 1, 0, 1, seed=1)
        tokens = [torch.from_numpy(batches.read(32 * step)).to(DEVICE) for step in range(options.rounds + 2)]
        contenders[f"2^{power}"] = trainer_step(config, tokens)
    seconds = alternate(contenders, options.rounds)
    first = next(iter(seconds.values()))
    return {
        "seconds": seconds,
        "ratio_to_first": {name: value / first for name, value in seconds.items()},
        "peak_bytes": peak_memory(DEVICE),
    }


def saves(options: argparse.Namespace) -> dict[str, Any]:
    """What a save of big tables costs training: blocking, in the background, and of changed rows alone."""
    from overtok_megatron.checkpoint.tables import TableWriter
    from overtok_megatron.training.engine import TrainingEngine, start_processes
    from overtok_megatron.training.saving import in_background

    single_process()
    config = configuration(
        ["over_encoding.init_std=0.02", f"over_encoding.table_rows={options.rows}", "over_encoding.collision_check=warn",
         "training.global_batch_size=32", "training.micro_batch_size=32"], options.data
    )  # fmt: skip
    batches = TrainBatches(IndexedDataset(options.data), config.data.seq_length, 32, 1, 0, 1, seed=1)
    trainer = TrainingEngine(config, start_processes(config), DEVICE, eod_id=0)
    assert trainer.tables is not None
    done = iter(range(10**9))

    def step() -> float:
        begin = time.perf_counter()
        trainer.step(torch.from_numpy(batches.read(32 * next(done))).to(DEVICE), 1e-3)
        return time.perf_counter() - begin

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1)

    alone = statistics.median([step() for _ in range(10)])
    writer = TableWriter(trainer.tables, 2)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for turn in range(options.rounds):
            folders = [Path(scratch) / f"{turn}-{kind}" for kind in ("background", "blocking", "changed")]
            for folder in folders:
                folder.mkdir()
            begin = time.perf_counter()
            thread = in_background(writer.begin(folders[0]))
            stall, during = time.perf_counter() - begin, []
            while thread.is_alive():
                during.append(step())
            background = time.perf_counter() - begin
            writer.forget()
            begin = time.perf_counter()
            writer.begin(folders[1])()
            blocking = time.perf_counter() - begin
            for _ in range(10):
                step()
            begin = time.perf_counter()
            write = writer.begin(folders[2])
            changed_stall = time.perf_counter() - begin
            write()
            rounds.append(
                {
                    "full_bytes": size(folders[0]),
                    "blocking_seconds": blocking,
                    "background_stall_seconds": stall,
                    "background_seconds": background,
                    "step_seconds_alone": alone,
                    "step_seconds_during": statistics.median(during),
                    "changed_bytes": size(folders[2]),
                    "changed_stall_seconds": changed_stall,
                    "changed_seconds": time.perf_counter() - begin,
                }
            )
            for folder in folders:
                shutil.rmtree(folder)
            writer.forget()
    figures: dict[str, Any] = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return figures | {
        "stall_over_blocking": figures["background_stall_seconds"] / figures["blocking_seconds"],
        "changed_over_full_bytes": figures["changed_bytes"] / figures["full_bytes"],
    }


def text_rows(options: argparse.Namespace, size: int) -> Tensor:
    """Rows [tokens, 4] of the n-grams of real text in four tables, two of 2-grams and two of 3-grams."""
    dataset = IndexedDataset(options.data)
    count = options.tokens // 128
    text = torch.stack([torch.from_numpy(dataset.tokens(index * 128, 128).astype("int64")) for index in range(count)])
    extended = torch.cat([text.new_full((count, 2), -1), text], dim=1)
    columns = [
        RowKernels().ngram_rows(extended[:, 3 - order :], HashTables((order,), (size - odd,), 8192, 0, False, 0, 1))
        for order, odd in ((2, 7), (2, 5), (3, 3), (3, 1))
    ]
    return torch.cat(columns, dim=-1).flatten(0, 1)


def table_case(options: argparse.Namespace, size: int, width: int, rows: Tensor) -> dict[str, Any]:
    """Every contender's seconds on one set of rows, and what they say per row and byte."""
    space = RowSpace(3, 2, size - 7, width)
    grad = torch.randn(*rows.shape, width, device=DEVICE)
    distinct = sum(column.unique().numel() for column in rows.unbind(1))

    def fits(*bytes_a_value: float) -> bool:
        return space.total_rows * width * sum(bytes_a_value) < options.memory * 2**30

    contenders: dict[str, Callable[[], object]] = {}
    for name, dtype in (("ours", torch.float32), ("ours, bf16", torch.bfloat16)):
        if fits(dtype.itemsize, 4 if "fbgemm" not in contenders and fits(8) else 0):
            values = grad if dtype == torch.float32 else grad.to(dtype)
            contenders[name], made = our_tables(rows, space, values, dtype)
            contenders[f"limit{name[4:]}"] = limit(made, rows, space, values)
    if fits(14) and (peer := fbgemm_tables(rows, size, grad)) is not None:
        contenders["fbgemm"] = peer
    if fits(26) and width <= 64:
        contenders["SparseAdam"] = torch_tables(rows, size, grad, sparse=True)
    if size <= 2**options.dense_up_to and width <= 64:
        contenders["AdamW"] = torch_tables(rows, size, grad, sparse=False)
    seconds = alternate(contenders, options.rounds)
    first = next(iter(contenders))
    value_bytes = 4 if first == "ours" else 2
    moved = width * (value_bytes * (2 * rows.numel() + 3 * distinct) + 4 * 3 * distinct)
    made.begin_rows(places(rows, space))  # once more by hand, to time the update alone
    made.collect(1.0)
    begin = time.perf_counter()
    made.apply(0.01, 1.0)
    return {
        "seconds": seconds,
        "times_first": {name: value / seconds[first] for name, value in seconds.items()},
        "share_of_limit": {name: seconds["limit" + name[4:]] / seconds[name] for name in seconds if name[:4] == "ours"},
        "distinct_share": distinct / rows.numel(),
        "rows_per_second": rows.numel() / seconds[first],
        "gigabytes_per_second": moved / seconds[first] / 1e9,
        "optimizer_nanoseconds_per_row": (time.perf_counter() - begin) / distinct * 1e9,
    }


def tables(options: argparse.Namespace) -> dict[str, Any]:
    """Forward, backward and update of look-ups in four tables: ours, the peers, and the machine's limit."""
    cases: dict[str, Any] = {}
    for width in options.widths:
        for power in options.powers:
            size = 2**power
            uniform = torch.randint(0, size - 7, (options.tokens, 4))
            for kind, rows in (("text", text_rows(options, size)), ("uniform", uniform)):
                if size * 4 * width * 2 > options.memory * 2**30:
                    print(f"w {width}, 2^{power} rows: more than --memory {options.memory} GiB, left out", flush=True)
                    continue
                case = cases[f"w {width}, 2^{power}, {kind}"] = table_case(options, size, width, rows.to(DEVICE))
                times = "  ".join(f"{name} {1e3 * value:.1f}" for name, value in case["seconds"].items())
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
                title=f"{kind} ids, w = {width}", yscale="log", ylabel="ms a step", xlabel="log2 of rows of a table"
            )
            panel.legend(fontsize=7)
    figure.savefig(options.png, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="runs/quickstart/data/train", help="prefix of a prepared set (the quickstart's)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--json", default=None, help="write the figures here too")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("dense", help="against transformers")
    verb.set_defaults(run=dense)
    verb = verbs.add_parser("rows", help="over table sizes")
    verb.add_argument("--powers", type=int, nargs="+", default=[16, 20, 24], help="table_rows as powers of two")
    verb.set_defaults(run=rows)
    verb = verbs.add_parser("tables", help="look-up, backward and update against the peers")
    verb.add_argument(
        "--powers", type=int, nargs="+", default=[16, 18, 20, 22, 24, 26], help="rows of a table, as powers of two"
    )
    verb.add_argument("--tokens", type=int, default=65536, help="positions a step, four look-ups each")
    verb.add_argument("--widths", type=int, nargs="+", default=[64, 256], help="values a row")
    verb.add_argument("--memory", type=float, default=18.0, help="GiB that a contender's tables and state may take")
    verb.add_argument("--dense-up-to", type=int, default=18, help="largest power for the dense optimizer")
    verb.add_argument("--png", default=None, help="draw the times here")
    verb.set_defaults(run=tables)
    verb = verbs.add_parser("saves", help="checkpoints of big tables")
    verb.add_argument("--rows", type=int, default=2**23 + 7, help="table_rows; four tables of 133 bytes a row")
    verb.add_argument("--folder", default=None, help="where to write (default: the system's temporary folder)")
    verb.set_defaults(run=saves)
    options = parser.parse_args()
    missing = process_environment(1, deterministic=False, cuda=DEVICE.type == "cuda")
    if missing:  # the allocator reads its settings when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    torch.set_num_threads(options.threads)
    try:
        result = options.run(options)
    except DataError as error:
        print(f"error: {error} (launchers/quickstart.sh makes it)", file=sys.stderr)
        return 2
    except OvertokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {options.threads} threads"
    text = json.dumps({"device": device, "torch": torch.__version__, **result}, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measured speed, contenders alternating in one process; ratios of medians are the figures.

dense: the baseline model's training step against Hugging Face's Olmo2ForCausalLM of the same shape.
rows: an over-encoded training step at growing table sizes; flat is the aim, since cost follows tokens.
tables: look-up, backward and update in four tables against fbgemm, SparseAdam, AdamW and the memory traffic alone.
overhead: whole runs of the quickstart's two models in turn: what over-encoding costs a step.
mapped: generation with the tables in a file, beside the same in memory.
speculative: decoding by drafts of a trained model's heads, beside plain decoding of the same model.
saves: what a checkpoint of big tables costs training, blocking, in the background, and of the rows changed in ten steps.
prepare: a corpus to a dataset on disk, beside the tokenizer library's own encoding of the same text in memory.
waiting: small parallel loops beside other work, for each way in which OpenMP threads may wait for one another.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_benchmark import prepare_speed
from measuring import alternate, configuration, save_beside_steps, single_process, steps_as_in_a_run
from overhead_benchmark import overhead
from speculation_benchmark import speculative
from table_benchmark import mapped, tables
from torch import Tensor
from waiting_benchmark import waiting

from overtok_megatron.config.counts import flops_per_token
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.batches import TrainBatches
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.environment import rank_environment, restore_visible_devices, usable_devices
from overtok_megatron.errors import ConfigError, DataError, OvertokError
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.assembly import build_transformer
from overtok_megatron.parallel.devices import CPU, default_device, num_accelerators
from overtok_megatron.training.measuring import peak_memory
from overtok_megatron.training.peaks import measured

_BATCHES = 200  # of the steps beside saves, then again from the first


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
    model.to(device=batch.device, dtype=torch.bfloat16)  # type: ignore[call-arg]  # a decorated method in transformers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs = batch[:, :-1]

    def step() -> None:
        model(inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(config: RunConfig, batch: Tensor) -> Callable[[], object]:
    """The same plain loop around this project's model."""
    kernels = choose_kernels(config.training.kernels, batch.device)
    model = build_transformer(config, device=batch.device, kernels=kernels)
    optimizer = kernels.adamw([{"params": list(model.parameters())}], 1e-3, (0.9, 0.999), 1e-8)
    inputs, targets = batch[:, :-1], batch[:, 1:]

    def step() -> None:
        (model(inputs, None, targets).objective / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dense(options: argparse.Namespace) -> dict[str, Any]:
    shape = [
        "over_encoding.enabled=false", "model.hidden_size=256", "model.intermediate_size=688", "model.num_layers=6",
        "model.num_attention_heads=4", "model.vocab_size=8192", "data.seq_length=256",
    ]  # fmt: skip
    config = configuration(shape, options.data)
    batch = torch.randint(0, 8192, (32, 257), device=options.device)
    seconds = alternate(
        {"overtok": our_step(config, batch), "transformers": hugging_face_step(config, batch)},
        options.rounds,
        options.device,
    )
    limit = flops_per_token(config) * 32 * 256 / measured(options.device, torch.bfloat16)
    return {
        "seconds": seconds,
        "ratio": seconds["transformers"] / seconds["overtok"],
        "limit_seconds": limit,
        "share_of_limit": limit / seconds["overtok"],
    }


def engine_step(config: RunConfig, tokens: list[Tensor], device: torch.device) -> Callable[[], object]:
    """Whole optimizer steps through DeepSpeed, a new batch each time. tokens: in host memory."""
    from overtok_megatron.training.engine import TrainingEngine
    from overtok_megatron.training.processes import start_processes

    return steps_as_in_a_run(TrainingEngine(config, start_processes(config, device), device, eod_id=0), tokens)


def whole_batches(dataset: IndexedDataset, seq_length: int) -> TrainBatches:
    """Steps of one micro-batch of 32 samples on one rank."""
    return TrainBatches(
        dataset,
        seq_length=seq_length,
        micro_batch_size=32,
        num_micro_batches=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=1,
    )


def rows(options: argparse.Namespace) -> dict[str, Any]:
    single_process()
    dataset = IndexedDataset(options.data)
    contenders = {}
    for power in options.powers:
        config = configuration(
            ["over_encoding.init_std=0.02", f"over_encoding.table_rows={2**power}", "over_encoding.collision_check=warn",
             "training.global_batch_size=32", "training.micro_batch_size=32"], options.data
        )  # fmt: skip
        batches = whole_batches(dataset, config.data.seq_length)
        tokens = [torch.from_numpy(batches.read(32 * step)) for step in range(options.rounds + 2)]
        contenders[f"2^{power}"] = engine_step(config, tokens, options.device)
    seconds = alternate(contenders, options.rounds, options.device)
    first = next(iter(seconds.values()))
    return {
        "seconds": seconds,
        "ratio_to_first": {name: value / first for name, value in seconds.items()},
        "peak_bytes": peak_memory(options.device),
    }


def saves(options: argparse.Namespace) -> dict[str, Any]:
    """What a save of big tables costs training: blocking, in the background, and of changed rows alone."""
    from overtok_megatron.checkpoint.tables import TableWriter
    from overtok_megatron.training.engine import TrainingEngine
    from overtok_megatron.training.processes import start_processes

    single_process()
    config = configuration(
        ["over_encoding.init_std=0.02", f"over_encoding.table_rows={options.rows}", "over_encoding.collision_check=warn",
         "training.global_batch_size=32", "training.micro_batch_size=32"], options.data
    )  # fmt: skip
    batches = whole_batches(IndexedDataset(options.data), config.data.seq_length)
    engine = TrainingEngine(config, start_processes(config, options.device), options.device, eod_id=0)
    assert engine.tables is not None
    train = steps_as_in_a_run(engine, [torch.from_numpy(batches.read(32 * number)) for number in range(_BATCHES)])

    def step() -> float:
        begin = time.perf_counter()
        train()
        return time.perf_counter() - begin

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1)

    alone = statistics.median([step() for _ in range(10)])
    writer = TableWriter(engine.tables, 2)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for turn in range(options.rounds):
            folders = [Path(scratch) / f"{turn}-{kind}" for kind in ("background", "blocking", "changed")]
            for folder in folders:
                folder.mkdir()
            stall, during, background = save_beside_steps(partial(writer.start_save, folders[0]), step, options.device)
            writer.forget()
            begin = time.perf_counter()
            writer.start_save(folders[1])()
            blocking = time.perf_counter() - begin
            for _ in range(10):
                step()
            begin = time.perf_counter()
            write = writer.start_save(folders[2])
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
    parameters = engine.tables.columns()["weight"].numel()
    return figures | {
        "blocking_seconds_per_billion_parameters": figures["blocking_seconds"] / parameters * 1e9,
        "stall_over_blocking": figures["background_stall_seconds"] / figures["blocking_seconds"],
        "changed_over_full_bytes": figures["changed_bytes"] / figures["full_bytes"],
    }


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
    verb = verbs.add_parser("overhead", help="the over-encoded quickstart's step beside the baseline's")
    verb.add_argument("--steps", type=int, default=80, help="of each run")
    verb.add_argument("--ranks", type=int, default=2, help="processes")
    verb.set_defaults(run=overhead)
    verb = verbs.add_parser("tables", help="look-up, backward and update against the peers")
    verb.add_argument(
        "--powers", type=int, nargs="+", default=[16, 18, 20, 22, 24, 26], help="rows of a table, as powers of two"
    )
    verb.add_argument("--tokens", type=int, default=65536, help="positions a step, four look-ups each")
    verb.add_argument("--widths", type=int, nargs="+", default=[64, 256], help="values a row")
    verb.add_argument(
        "--memory",
        type=float,
        help="GiB that all contenders of a case may take together with the process itself; those "
        "that do not fit are left out (default: four fifths of what is available)",
    )
    verb.add_argument("--dense-up-to", type=int, default=18, help="largest power for the dense optimizer")
    verb.add_argument("--png", default=None, help="draw the times here")
    verb.set_defaults(run=tables)
    verb = verbs.add_parser("mapped", help="generation with the rows left in a file")
    verb.add_argument("--rows", type=int, default=2**26, help="of all four tables together")
    verb.add_argument("--batch", type=int, default=4, help="texts at a time")
    verb.add_argument("--new", type=int, default=64, help="tokens a text")
    verb.add_argument("--folder", default=None, help="where to write (default: the system's temporary folder)")
    verb.set_defaults(run=mapped)
    verb = verbs.add_parser("speculative", help="decoding by drafts")
    verb.add_argument("run_folder", metavar="RUN", help="a run's output folder whose model has heads")
    verb.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="texts at a time")
    verb.add_argument("--prompt", type=int, default=32, help="tokens of a prompt, from --data")
    verb.add_argument("--new", type=int, default=64, help="tokens of a text")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    verb.set_defaults(run=speculative)
    verb = verbs.add_parser("saves", help="checkpoints of big tables")
    verb.add_argument("--rows", type=int, default=2**23 + 7, help="table_rows of the four tables")
    verb.add_argument("--folder", default=None, help="where to write (default: the system's temporary folder)")
    verb.set_defaults(run=saves)
    verb = verbs.add_parser("prepare", help="text to tokens on disk")
    verb.add_argument("--tokenizer", required=True, help="sentencepiece model or Hugging Face tokenizer.json")
    verb.add_argument("--copies", type=int, default=4, help="of the quickstart's corpus, 12 MB each")
    verb.add_argument("--folder", default=None, help="where to write (default: the system's temporary folder)")
    verb.set_defaults(run=prepare_speed)
    verb = verbs.add_parser("waiting", help="OpenMP threads on an idle machine and beside other work")
    verb.add_argument("--busy", type=int, default=2, help="processes beside it at most, that use a core each")
    verb.set_defaults(run=waiting)
    options = parser.parse_args()
    try:
        options.device = default_device() if usable_devices(os.environ, num_accelerators()) else CPU
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment = rank_environment(os.environ, 1, deterministic=False, cuda=options.device.type == "cuda")
    restore_visible_devices(environment)
    if "PYTHONSAFEPATH" not in os.environ:  # which hides the modules beside this file
        del environment["PYTHONSAFEPATH"]
    if environment != dict(os.environ):  # the allocator reads its settings when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(options.threads)
    try:
        result = options.run(options)
    except DataError as error:
        print(f"error: {error} (launchers/quickstart.sh makes it)", file=sys.stderr)
        return 2
    except OvertokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else f"CPU, {options.threads} threads"
    text = json.dumps({"device": device, "torch": torch.__version__, **result}, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

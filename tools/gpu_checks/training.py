"""Small training runs: their configuration, a few optimizer steps of it, and the losses of a CPU process beside them.

Shapes: B sequences per step over all ranks, A micro-batches, b micro batch, s sequence.
"""

import gc
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpu_checks.registry import Context
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.files import write_atomically
from overtok_megatron.parallel.grid import ProcessGrid

if TYPE_CHECKING:
    from overtok_megatron.training.engine import TrainingEngine

Settings = dict[str, Any]  # dotted key -> value
STEPS = 3
_RATE = 1e-3
_SHAPE: Settings = {  # small, and uneven where evenness is not asked for
    "model.vocab_size": 515,
    "model.hidden_size": 64,
    "model.intermediate_size": 104,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "over_encoding.enabled": True,
    "over_encoding.table_rows": 3001,
    "over_encoding.collision_check": "warn",
    "data.seq_length": 64,
}
_CUDA_SHAPE: Settings = {
    "model.hidden_size": 256,
    "model.intermediate_size": 680,
    "model.num_layers": 4,
    "over_encoding.table_rows": 50_021,
    "data.seq_length": 256,
}


def nested(settings: Settings) -> dict[str, Any]:
    """Dotted keys as sections."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return result


def configuration(settings: Settings, ranks: int) -> RunConfig:
    """A validated configuration of these settings and what a run cannot do without."""
    needed: Settings = {
        "tokenizer.type": "bytes",
        "data.train": "unused",
        "optimizer.learning_rate": _RATE,
        "training.output_directory": "unused",
        "training.train_iters": STEPS,
    }
    config = RunConfig.model_validate(nested(needed | settings))
    validate(config, ranks, lambda key: "gpu_check")
    return config


def small_configuration(context: Context, cuda_sizes: bool, settings: Settings) -> RunConfig:
    """The small over-encoded model with settings of a case, for a global batch of `context.batch` on the context's ranks.

    cuda_sizes: of the device that is checked, also where the CPU computes what it is compared with.
    """
    shape = _SHAPE | (_CUDA_SHAPE if cuda_sizes else {})
    given: Settings = {"training.precision": "fp32"} | shape | settings
    others = [given.get(f"parallel.{axis}_parallel_size", 1) for axis in ("tensor", "pipeline", "context")]
    copies = context.ranks // (others[0] * others[1] * others[2])
    micro_batches = given.pop("micro_batches", 1)
    micro = context.batch // (copies * micro_batches)
    return configuration(
        given | {"training.micro_batch_size": micro, "training.global_batch_size": context.batch}, context.ranks
    )


def made_tokens(context: Context, config: RunConfig, steps: int = STEPS) -> list[Tensor]:
    """The same tokens [B, s + 1] int64 for every process, with some ends of documents, on the CPU."""
    generator = torch.Generator().manual_seed(5)
    shape = (config.training.global_batch_size, config.data.seq_length + 1)
    batches = []
    for _ in range(steps):  # small tokens are frequent, 0 ends documents
        share = torch.rand(shape, generator=generator) ** 2
        batches.append((share * (config.model.vocab_size - 1)).long())
    return batches


@lru_cache(maxsize=16)
def _grid(world: int, tensor: int, pipe: int, slices: int, device: torch.device) -> ProcessGrid:
    """Groups of a shape, made once: communicators are not given back."""
    from overtok_megatron.training.processes import start_processes

    shape = {
        "parallel.tensor_parallel_size": tensor,
        "parallel.pipeline_parallel_size": pipe,
        "parallel.context_parallel_size": slices,
    }
    sizes = {"training.micro_batch_size": 1, "training.global_batch_size": world // (tensor * pipe * slices)}
    model = _SHAPE | {"model.num_layers": max(2, pipe), "data.seq_length": 64 * tensor * slices}
    return start_processes(configuration(model | shape | sizes | {"training.precision": "fp32"}, world), device)


def grid_of(context: Context, config: RunConfig) -> ProcessGrid:
    """The process grid that a configuration asks for."""
    parallel = config.parallel
    return _grid(
        context.ranks,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
        context.device,
    )


def engine_of(context: Context, config: RunConfig) -> "TrainingEngine":
    """A training engine with its initial weights; token 0 ends documents."""
    from overtok_megatron.training.engine import TrainingEngine

    if config.training.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.training.deterministic)
    return TrainingEngine(config, grid_of(context, config), context.device, eod_id=0)


def own_part(engine: "TrainingEngine", tokens: Tensor) -> Tensor:
    """Of tokens [B, s + 1] those of this rank's copy of the model, [A, b, s + 1] in host memory."""
    grid, micro = engine.grid, engine.config.training.micro_batch_size
    own = tokens.chunk(grid.shape.data)[grid.data_rank]
    return own.view(-1, micro, tokens.shape[1])


def train_steps(engine: "TrainingEngine", batches: list[Tensor]) -> list[float]:
    """The loss of each step; rows are fetched ahead where the configuration says so."""
    parts = [own_part(engine, batch) for batch in batches]
    losses = []
    for number, part in enumerate(parts):
        for ahead in parts[:2] if number == 0 else parts[number + 1 : number + 2]:
            engine.announce(ahead)
        losses.append(engine.step(part.to(engine.device), _RATE).loss)
    return losses


def losses_of(context: Context, config: RunConfig) -> list[float]:
    """Losses of the first steps from the initial weights; nothing of the engine stays."""
    engine = engine_of(context, config)
    try:
        return train_steps(engine, made_tokens(context, config))
    finally:
        del engine
        gc.collect()


class References:
    """Computes the losses of cases in a CPU process, in float32 and torch's operators, one file per case in the folder.

    ranks: of the processes that are checked, which settle the batch. cuda_sizes: those of a CUDA device.
    """

    def __init__(self, cases: dict[str, Settings], ranks: int, cuda_sizes: bool) -> None:
        self.cases, self.ranks, self.cuda_sizes = cases, ranks, cuda_sizes

    def __call__(self, context: Context) -> None:
        wanted = Context(context.device, context.folder, ranks=self.ranks).batch
        for name, settings in self.cases.items():
            given = {"training.precision": "fp32", "training.kernels": "torch", **_SHAPE}
            given |= (_CUDA_SHAPE if self.cuda_sizes else {}) | settings
            given |= {"training.micro_batch_size": wanted, "training.global_batch_size": wanted}
            try:
                value: Any = losses_of(context, configuration(given, 1))
            except Exception as error:  # told where it is waited for
                value = f"{type(error).__name__}: {error}"
            write_atomically(_reference_file(context.folder, name), json.dumps(value), durable=False)


def _reference_file(folder: Path, name: str) -> Path:
    return folder / f"reference-{name}.json"


def reference_losses(context: Context, name: str) -> list[float]:
    """What `References` found for a case; waits for it. Raises RuntimeError where that failed."""
    path = _reference_file(context.folder, name)
    while not path.exists():  # the check's own time limit ends this
        time.sleep(0.05)
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, str):
        raise RuntimeError(f"the CPU process could not compute the reference {name}: {value}")
    losses: list[float] = value
    return losses

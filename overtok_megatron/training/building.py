"""The parts of a training engine, each made from the configuration and the grid: model, tables, optimizer."""

from typing import Any

import torch

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.assembly import attention_boundary, build_run_layers, build_transformer
from overtok_megatron.model.transformer import Stage, Transformer
from overtok_megatron.ngram.building import build_tables
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.deepspeed.pipeline_stage import PipelineStage

TrainedModule = Transformer | PipelineStage


def build_model(
    config: RunConfig, grid: ProcessGrid, *, device: torch.device, kernels: Kernels, eod_id: int
) -> TrainedModule:
    """This rank's part of the model with its initial weights: all layers, or those of its pipeline stage."""
    groups: dict[str, Any] = {
        "kernels": kernels,
        "tensor_group": grid.tensor_group,
        "context_group": grid.context_group,
    }
    if grid.shape.pipe == 1:
        model = build_transformer(config, device=device, eod_id=eod_id, **groups)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(derived.is_trained(config.training.train_only, name))
        return model
    counts = derived.blocks_per_stage(config)
    layers = build_run_layers(config, device=device, stage=Stage.of(grid.coordinate("pipe"), counts), **groups)
    return PipelineStage(
        layers,
        counts,
        grid,
        z_loss_weight=config.training.z_loss,
        num_micro_batches=derived.accumulation_steps(config, grid.shape.world_size),
        sequence_parallel=config.parallel.sequence_parallel,
        eod_id=attention_boundary(config, eod_id),
        num_later_heads=(config.over_decoding.num_tokens > 1) + (config.multi_token_prediction.depth > 0),
    )


def build_own_tables(
    config: RunConfig, grid: ProcessGrid, *, device: torch.device, kernels: Kernels, eod_id: int
) -> ShardedTables | None:
    """This rank's share of the n-gram tables, with its initial rows; None where the model has no tables.

    The ranks that see a sequence divide its look-ups among them: context slices first, then tensor slices.
    """
    if not config.over_encoding.enabled:
        return None
    if config.training.train_only is not None:
        config = derived.with_frozen_tables(config)
    shape = grid.shape
    sequence_slice_index = grid.coordinate("context") * shape.tensor + grid.tensor_rank
    return build_tables(
        config,
        eod_id,
        device=device,
        kernels=kernels,
        group=grid.table_group,
        sequence_slice=(sequence_slice_index, shape.context * shape.tensor),
    )


def build_optimizer(model: TrainedModule, config: RunConfig, kernels: Kernels) -> torch.optim.Optimizer:
    """AdamW over the dense parameters that are trained.

    At a learning rate of 0, so that nothing DeepSpeed does at start moves a weight.

    Matrices decay; norms do not, nor does the word embedding unless it is the head as well (as in OLMo 2).
    """
    settings = config.optimizer
    word = None if model.embedding is None or config.model.tie_word_embeddings else model.embedding.word
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [p for p in trained if p.ndim < 2 or (word is not None and p is word.weight)]
    without_decay = {id(parameter) for parameter in others}
    decayed = [parameter for parameter in trained if id(parameter) not in without_decay]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (others, 0.0))
        if parameters  # a stage may hold only an embedding, and DeepSpeed flattens no empty group
    ]
    adamw = kernels.choose_adamw(offloaded=config.parallel.offload_optimizer == "cpu")
    return adamw(groups, 0.0, settings.betas, settings.eps)


def names_in_order(model: TrainedModule, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of a torch optimizer's parameters in its own order, before DeepSpeed puts flat tensors in their place."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

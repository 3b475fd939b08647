"""From a run's configuration to a model and its tables: the root below which no config object is passed on."""

import torch
import torch.distributed as dist

from overtok_megatron.config.derived import attention_windows, head_size, key_value_heads
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RunConfig
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.dtypes import DTYPES
from overtok_megatron.model.block import Block, Experts, Recompute
from overtok_megatron.model.embedding import InputEmbedding
from overtok_megatron.model.heads import OutputHead
from overtok_megatron.model.rotary import RopeScaling, Rotary
from overtok_megatron.model.transformer import Layers, Stage, Transformer
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.projection import NgramProjection


def build_encoder(
    model: ModelConfig, over: OverEncodingConfig, group: dist.ProcessGroup | None = None
) -> NgramProjection:
    """The over-encoder's dense part, weights not yet initialised."""
    space = row_space(model, over)
    return NgramProjection(
        model.hidden_size,
        space.num_base_tables,
        combine=over.combine,
        row_width=space.width,
        added_tables=[tables.num_tables for tables in space.added],
        group=group,
    )


def rope_scaling(model: ModelConfig) -> RopeScaling | None:
    """How rotary angles are stretched on the layers with full attention."""
    section = model.rope_scaling
    if section is None:
        return None
    given = section.model_dump(exclude_none=True)
    length = given.pop("original_max_position_embeddings", 1)
    return RopeScaling(original_length=length, **given)


def experts(model: ModelConfig) -> Experts | None:
    """The feed-forward of a block, if it is a mixture; weights of the routers' losses so that layers are averaged."""
    if model.num_experts is None:
        return None
    assert model.num_experts_per_token is not None
    return Experts(
        num_experts=model.num_experts,
        per_token=model.num_experts_per_token,
        normalize_weights=model.normalize_expert_weights,
        balance_weight=model.router_aux_loss_weight / model.num_layers,
        z_weight=model.router_z_loss_weight / model.num_layers,
    )


def build_layers(
    model: ModelConfig,
    over: OverEncodingConfig,
    *,
    kernels: Kernels,
    stage: Stage | None = None,
    group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> Layers:
    """The layers of a stage (None = all), weights not yet initialised. `group` is the tensor-parallel group."""
    stage = stage or Stage.of(0, [model.num_layers])
    embedding = head = None
    if stage.first or (stage.last and model.tie_word_embeddings):
        encoder = None
        if over.enabled and stage.first:
            encoder = build_encoder(model, over, group)
        embedding = InputEmbedding(
            model.vocab_size, model.hidden_size, over_encoding=encoder, group=group, sequence_parallel=sequence_parallel
        )
    windows = attention_windows(model)
    plain = Rotary(head_size(model), model.rope_theta)
    scaled = plain if model.rope_scaling is None else Rotary(head_size(model), model.rope_theta, rope_scaling(model))
    blocks = {
        index: Block(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=key_value_heads(model),
            head_size=head_size(model),
            qk_norm=model.qk_norm == "full",
            window=windows[index],
            norm_placement=model.norm_placement,
            experts=experts(model),
            norm_epsilon=model.norm_epsilon,
            rotary=scaled if windows[index] is None else plain,
            layer_index=index,
            group=group,
            context_group=context_group,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            kernels=kernels,
        )
        for index in range(stage.start, stage.stop)
    }
    if stage.last:
        head = OutputHead(
            model.vocab_size,
            model.hidden_size,
            norm_epsilon=model.norm_epsilon,
            tied=embedding.word if embedding is not None and model.tie_word_embeddings else None,
            group=group,
            sequence_parallel=sequence_parallel,
            kernels=kernels,
        )
    return Layers(embedding, blocks, head)


def build_run_layers(
    config: RunConfig,
    *,
    device: torch.device,
    kernels: Kernels,
    stage: Stage | None = None,
    group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
) -> Layers:
    """The layers of a run's stage with their initial weights, in the run's precision."""
    layers = build_layers(
        config.model,
        config.over_encoding,
        stage=stage,
        group=group,
        context_group=context_group,
        sequence_parallel=config.parallel.sequence_parallel and group is not None,
        recompute=config.training.recompute,
        kernels=kernels,
    )
    layers.reset(config.training.seed, config.model.init_std)
    for layer in (layers.embedding, *layers.blocks.values(), layers.head):
        if layer is not None:
            layer.to(device=device, dtype=DTYPES[config.training.precision])
    return layers


def build_transformer(
    config: RunConfig,
    *,
    device: torch.device,
    kernels: Kernels,
    group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
    eod_id: int | None = None,
) -> Transformer:
    """The model of a run with its initial weights, in the run's precision.

    eod_id: the token that ends a document; without need where attention goes across documents.
    """
    layers = build_run_layers(config, device=device, kernels=kernels, group=group, context_group=context_group)
    if config.data.document_attention == "across":
        return Transformer(layers)
    assert eod_id is not None, "attention within documents needs the token that ends them"
    return Transformer(layers, eod_id=eod_id, context_group=context_group)

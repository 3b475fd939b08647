"""From a run's configuration to a model and its tables: the root below which no config object is passed on."""

from functools import partial

import torch
import torch.distributed as dist

from overtok_megatron.config.derived import attention_windows, head_size, key_value_heads, row_width
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RunConfig
from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.model.block import Block, Experts, Recompute
from overtok_megatron.model.embedding import InputEmbedding
from overtok_megatron.model.heads import OutputHead
from overtok_megatron.model.rotary import RopeScaling, Rotary
from overtok_megatron.model.transformer import Layers, Stage, Transformer
from overtok_megatron.ngram.projection import NgramProjection
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.ngram.exchange import Exchange, FlatExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.placement import make_exchange, owned_range
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.row_space import RowSpace, TableGroup
from overtok_megatron.ngram.row_store import Shard, TableShard

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def row_space(model: ModelConfig, over: OverEncodingConfig) -> RowSpace:
    """The tables that a validated, enabled over-encoding section asks for."""
    assert over.enabled and over.table_rows is not None
    added = [TableGroup(tuple(one.orders), one.num_slices, one.table_rows, one.frozen) for one in over.added]
    width = row_width(model, over)
    return RowSpace(over.ngram_order, over.num_slices, over.table_rows, width, tuple(added), over.frozen)


def build_encoder(model: ModelConfig, over: OverEncodingConfig, group: dist.ProcessGroup | None = None) -> NgramProjection:
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
        kernels=choose_kernels(config.training.kernels, device),
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
    group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
    eod_id: int | None = None,
) -> Transformer:
    """The model of a run with its initial weights, in the run's precision.

    eod_id: the token that ends a document; without need where attention goes across documents.
    """
    layers = build_run_layers(config, device=device, group=group, context_group=context_group)
    if config.data.document_attention == "across":
        return Transformer(layers)
    assert eod_id is not None, "attention within documents needs the token that ends them"
    return Transformer(layers, eod_id=eod_id, context_group=context_group)


def build_tables(
    config: RunConfig,
    encoder: NgramProjection | None,
    eod_id: int,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    sequence_slice: tuple[int, int] = (0, 1),
    training: bool = True,
) -> ShardedTables:
    """This rank's tables with initial rows. group: the table group, which is the world; None = all rows are here.

    encoder: the module that the rows feed; None on a pipeline stage that has none and only serves rows.
    sequence_slice: (index, count) of the slice of every sequence that this rank looks up. training: with an optimizer.
    """
    over, seed = config.over_encoding, config.training.seed
    space = row_space(config.model, over)
    host = over.storage == "host"
    place = torch.device("cpu") if host else device
    kernels = choose_kernels(config.training.kernels, place).rows
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    shard = TableShard(
        *owned_range(space.total_rows, rank, size, over.ranks_per_host),
        space.width,
        std=over.init_std,
        seed=seed,
        device=place,
        dtype=ROW_DTYPES[over.row_dtype],
        kernels=kernels,
    )
    optimizer = None
    if training:
        optimizer = RowOptimizer(
            over.optimizer,
            shard.rows,
            weight_decay=over.weight_decay,
            betas=over.betas,
            eps=over.eps,
            state_dtype=ROW_DTYPES[over.state_dtype],
            seed=seed,
            kernels=kernels,
        )

    def exchange() -> Exchange:  # each has process groups of its own in host memory
        return make_exchange(
            space.total_rows,
            group,
            ranks_per_host=over.ranks_per_host,
            kernels=kernels,
            gradient_dtype=ROW_DTYPES[over.gradient_dtype],
            trained=space.trained_at if space.any_frozen else None,
            backend="gloo" if host else None,
        )

    ahead = (
        Prefetch(exchange(), partial(shard.read, dtype=DTYPES[config.training.precision]))
        if host and training
        else None
    )
    return tables_over(
        config, encoder, eod_id, shard, device=device, group=group, sequence_slice=sequence_slice,
        optimizer=optimizer, exchange=exchange(), ahead=ahead,
    )  # fmt: skip


def tables_over(
    config: RunConfig,
    encoder: NgramProjection | None,
    eod_id: int,
    shard: Shard,
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    sequence_slice: tuple[int, int] = (0, 1),
    optimizer: RowOptimizer | None = None,
    exchange: Exchange | None = None,
    ahead: Prefetch | None = None,
) -> ShardedTables:
    """Tables over a shard that is there already; by default one that has all rows, to be read."""
    over, space = config.over_encoding, row_space(config.model, config.over_encoding)
    kernels = choose_kernels(config.training.kernels, device).rows
    return ShardedTables(
        encoder,
        NgramHash(space, over.hash_base or config.model.vocab_size, over.pad_id, over.boundary, eod_id, kernels),
        shard,
        optimizer,
        exchange or FlatExchange((0, space.total_rows), None, shard.kernels),
        dtype=DTYPES[config.training.precision],
        device=device,
        kernels=kernels,
        group=group,
        sequence_slice=sequence_slice,
        ahead=ahead,
    )

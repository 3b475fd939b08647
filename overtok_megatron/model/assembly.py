"""From a run's configuration to its model. Below this file no configuration object is passed on: layers take values.

One method builds one kind of part; `Assembly.layers` puts the parts of a pipeline stage together. Weights are initialised
by `Layers.reset`. The tables of an over-encoded model are built elsewhere (ngram/building.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

from overtok_megatron.config.derived import attention_windows, has_word_embedding, head_size, key_value_heads
from overtok_megatron.config.output_schema import MultiTokenPredictionConfig, OverDecodingConfig
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, Recompute, RunConfig
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.dtypes import DTYPES
from overtok_megatron.model.attention import Attention, AttentionShape
from overtok_megatron.model.block import Block
from overtok_megatron.model.embedding import EmbeddingPart, InputEmbedding
from overtok_megatron.model.feed_forward import FeedForward
from overtok_megatron.model.heads import OutputHead
from overtok_megatron.model.mlp import SwiGLU
from overtok_megatron.model.moe import MixtureOfExperts, RoutingRule
from overtok_megatron.model.multi_token import MultiTokenLayer, MultiTokenPrediction
from overtok_megatron.model.norm import RMSNorm, RMSNormAdded, RMSNormOfSum
from overtok_megatron.model.over_decoding import OverDecoding
from overtok_megatron.model.rotary import RopeScaling, Rotary
from overtok_megatron.model.transformer import Layers, Stage, Transformer
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.projection import NgramProjection
from overtok_megatron.parallel.collectives import group_size
from overtok_megatron.parallel.linear import SlicedInputLinear
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

AnyNorm = TypeVar("AnyNorm", RMSNorm, RMSNormAdded, RMSNormOfSum)


def build_encoder(
    model: ModelConfig, over: OverEncodingConfig, tensor_group: dist.ProcessGroup | None = None
) -> NgramProjection:
    """The over-encoder's dense part, weights not yet initialised."""
    space = row_space(model, over)
    return NgramProjection(
        model.hidden_size,
        space.num_base_tables,
        combine=over.combine,
        row_width=space.width,
        added_tables=[tables.num_tables for tables in space.added],
        group=tensor_group,
    )


def attention_shape(model: ModelConfig) -> AttentionShape:
    return AttentionShape(
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_key_value_heads=key_value_heads(model),
        head_size=head_size(model),
        qk_norm_epsilon=model.norm_epsilon if model.qk_norm == "full" else None,
    )


def rope_scaling(model: ModelConfig) -> RopeScaling | None:
    """How rotary angles are stretched on the layers with full attention."""
    section = model.rope_scaling
    if section is None:
        return None
    given = section.model_dump(exclude_none=True)
    length = given.pop("original_max_position_embeddings", 1)
    return RopeScaling(original_length=length, **given)


def routing_rule(model: ModelConfig) -> RoutingRule:
    """For a model with experts. The weights of the routers' losses are divided by the layers, so that they are averaged."""
    assert model.num_experts is not None and model.num_experts_per_token is not None
    return RoutingRule(
        num_experts=model.num_experts,
        experts_per_token=model.num_experts_per_token,
        normalize_weights=model.normalize_expert_weights,
        balance_weight=model.router_aux_loss_weight / model.num_layers,
        z_weight=model.router_z_loss_weight / model.num_layers,
    )


def shared_parts(model: ModelConfig, multi_token_depth: int) -> tuple[EmbeddingPart, ...]:
    """The dense parts of the embedding that the last stage uses as well.

    A tied head uses the word embedding; multi-token prediction embeds further tokens, and so uses all parts.
    """
    if multi_token_depth:
        return ("word", "over_encoding")
    return ("word",) if model.tie_word_embeddings else ()


def attention_boundary(config: RunConfig, eod_id: int | None) -> int | None:
    """The token that ends a document where positions attend within their document only; None where they attend across.

    eod_id: the tokenizer's end-of-document token; may be None where attention goes across documents.
    """
    if config.data.document_attention == "across":
        return None
    assert eod_id is not None, "attention within documents needs the token that ends them"
    return eod_id


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Builds the parts of one model. kernels, groups, sequence_parallel and recompute say how it runs on this rank.

    weights_on_call: a weight is whole while the module that holds it is called, and not otherwise (ZeRO 3).
    """

    model: ModelConfig
    over: OverEncodingConfig
    over_decoding: OverDecodingConfig
    multi_token: MultiTokenPredictionConfig
    kernels: Kernels
    tensor_group: dist.ProcessGroup | None
    context_group: dist.ProcessGroup | None
    sequence_parallel: bool
    recompute: Recompute
    weights_on_call: bool

    @cached_property
    def rotaries(self) -> tuple[Rotary, Rotary]:
        """For layers with a sliding window, and for those with full attention. Layers share them, and so their angles."""
        plain = Rotary(head_size(self.model), self.model.rope_theta)
        scaling = rope_scaling(self.model)
        return plain, plain if scaling is None else Rotary(head_size(self.model), self.model.rope_theta, scaling)

    def norm(self, kind: type[AnyNorm], *, of_slices: bool | None = None) -> AnyNorm:
        """Over the hidden size, which every rank holds in full.

        of_slices: whether each tensor-parallel rank brings positions of its own; None = under sequence parallelism.
        """
        model, sliced = self.model, self.sequence_parallel if of_slices is None else of_slices
        sum_group = self.tensor_group if sliced else None
        return kind(model.hidden_size, eps=model.norm_epsilon, kernels=self.kernels, sum_group=sum_group)

    def embedding(self, parts: Sequence[EmbeddingPart]) -> InputEmbedding | None:
        """Those dense parts that are named, of the parts that the model has; None without any."""
        model, word, over_encoding = self.model, None, None
        if "word" in parts and has_word_embedding(self.over):
            word = VocabParallelEmbedding(
                model.vocab_size,
                model.hidden_size,
                group=self.tensor_group,
                sequence_parallel=self.sequence_parallel,
            )
        if "over_encoding" in parts and self.over.enabled:
            over_encoding = build_encoder(model, self.over, self.tensor_group)
        if word is None and over_encoding is None:
            return None
        return InputEmbedding(
            word=word,
            over_encoding=over_encoding,
            tensor_group=self.tensor_group,
            sequence_parallel=self.sequence_parallel,
        )

    def attention(self, index: int, window: int | None) -> Attention:
        sliding, full = self.rotaries
        return Attention(
            attention_shape(self.model),
            window=window,
            rotary=full if window is None else sliding,
            layer_index=index,
            kernels=self.kernels,
            tensor_group=self.tensor_group,
            context_group=self.context_group,
            sequence_parallel=self.sequence_parallel,
            recompute_core=self.recompute == "selective",
        )

    def feed_forward(self) -> FeedForward:
        if self.model.num_experts is None:
            return SwiGLU(
                hidden_size=self.model.hidden_size,
                intermediate_size=self.model.intermediate_size,
                kernels=self.kernels,
                tensor_group=self.tensor_group,
                sequence_parallel=self.sequence_parallel,
            )
        return MixtureOfExperts(
            hidden_size=self.model.hidden_size,
            intermediate_size=self.model.intermediate_size,
            rule=routing_rule(self.model),
            kernels=self.kernels,
            tensor_group=self.tensor_group,
            context_group=self.context_group,
            sequence_parallel=self.sequence_parallel,
        )

    def block(self, index: int, window: int | None) -> Block:
        """index: its entry in a decoding cache. window: as in `Attention`."""
        post = self.model.norm_placement == "post"
        return Block(
            attention=self.attention(index, window),
            feed_forward=self.feed_forward(),
            attention_norm=self.norm(RMSNormAdded) if post else self.norm(RMSNorm),
            feed_forward_norm=self.norm(RMSNormAdded) if post else self.norm(RMSNormOfSum),
            recompute=self.recompute == "full",
            halves=self.kernels.layers if self._runs_in_halves() else None,
        )

    def _runs_in_halves(self) -> bool:
        """Whether no collective and no module with a gathered weight stands between a layer's core and its ends."""
        dense = self.model.num_experts is None
        return dense and group_size(self.tensor_group) == 1 and not self.weights_on_call

    def head(self, embedding: InputEmbedding | None) -> OutputHead:
        """embedding: where a tied head finds its weight."""
        model, tied = self.model, None
        if model.tie_word_embeddings:
            assert embedding is not None and embedding.word is not None, "a tied head needs the word embedding"
            tied = embedding.word
        return OutputHead(
            norm=self.norm(RMSNorm),
            output=VocabParallelHead(model.vocab_size, model.hidden_size, group=self.tensor_group, tied=tied),
            kernels=self.kernels,
            tensor_group=self.tensor_group,
            sequence_parallel=self.sequence_parallel,
        )

    def over_decoding_tables(self) -> OverDecoding | None:
        """Tables 2 and further; None without any."""
        section = self.over_decoding
        if section.num_tokens == 1:
            return None
        return OverDecoding(
            self.model.vocab_size,
            self.model.hidden_size,
            loss_weights=section.loss_weights,
            low_rank=section.low_rank,
            kernels=self.kernels,
            tensor_group=self.tensor_group,
            sequence_parallel=self.sequence_parallel,
        )

    def multi_token_prediction(self) -> MultiTokenPrediction | None:
        """The layers that predict further tokens. Each uses full attention, and has a decoding cache of their own in common."""
        section = self.multi_token
        if not section.depth:
            return None
        layers = [self._multi_token_layer(index) for index in range(section.depth)]
        return MultiTokenPrediction(layers, loss_weight=section.loss_weight)

    def _multi_token_layer(self, index: int) -> MultiTokenLayer:
        size = self.model.hidden_size
        return MultiTokenLayer(
            embedding_norm=self.norm(RMSNorm, of_slices=True),
            hidden_norm=self.norm(RMSNorm, of_slices=True),
            projection=SlicedInputLinear(
                2 * size, size, group=self.tensor_group, sequence_parallel=self.sequence_parallel
            ),
            block=self.block(index, None),
            norm=self.norm(RMSNorm),
            tensor_group=self.tensor_group,
            sequence_parallel=self.sequence_parallel,
        )

    def layers(self, stage: Stage, shared: Sequence[EmbeddingPart]) -> Layers:
        """shared: the parts of the embedding of which the last stage holds a copy; it gets no others."""
        parts: Sequence[EmbeddingPart] = ("word", "over_encoding") if stage.first else shared if stage.last else ()
        embedding = self.embedding(parts)
        windows = attention_windows(self.model)
        blocks = {index: self.block(index, windows[index]) for index in range(stage.start, stage.stop)}
        if not stage.last:
            return Layers(embedding, blocks, None, tuple(shared))
        heads = self.head(embedding), tuple(shared), self.over_decoding_tables(), self.multi_token_prediction()
        return Layers(embedding, blocks, *heads)


def build_layers(
    model: ModelConfig,
    over: OverEncodingConfig,
    *,
    over_decoding: OverDecodingConfig | None = None,
    multi_token: MultiTokenPredictionConfig | None = None,
    kernels: Kernels,
    stage: Stage | None = None,
    shared: Sequence[EmbeddingPart] | None = None,
    tensor_group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    weights_on_call: bool = False,
) -> Layers:
    """The layers of a stage (None = all), weights not yet initialised. weights_on_call: as in `Assembly`.

    over_decoding, multi_token: None = without such heads.
    shared: the parts of the embedding of which the last of several stages holds a copy; None = those that the model needs.
    """
    assembly = Assembly(
        model=model,
        over=over,
        over_decoding=over_decoding or OverDecodingConfig(),
        multi_token=multi_token or MultiTokenPredictionConfig(),
        kernels=kernels,
        tensor_group=tensor_group,
        context_group=context_group,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        weights_on_call=weights_on_call,
    )
    if shared is None:
        shared = shared_parts(model, assembly.multi_token.depth)
    return assembly.layers(stage or Stage.of(0, [model.num_layers]), shared)


def build_multi_token(config: RunConfig) -> MultiTokenPrediction | None:
    """The layers of multi-token prediction alone and whole, weights not yet initialised; None without them."""
    return Assembly(
        model=config.model,
        over=config.over_encoding,
        over_decoding=config.over_decoding,
        multi_token=config.multi_token_prediction,
        kernels=Kernels(),
        tensor_group=None,
        context_group=None,
        sequence_parallel=False,
        recompute="none",
        weights_on_call=False,
    ).multi_token_prediction()


def build_run_layers(
    config: RunConfig,
    *,
    device: torch.device,
    kernels: Kernels,
    stage: Stage | None = None,
    shared: Sequence[EmbeddingPart] | None = None,
    tensor_group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
) -> Layers:
    """The layers of a run's stage with their initial weights, in the run's precision. stage, shared: as in `build_layers`."""
    layers = build_layers(
        config.model,
        config.over_encoding,
        over_decoding=config.over_decoding,
        stage=stage,
        shared=shared,
        tensor_group=tensor_group,
        context_group=context_group,
        sequence_parallel=config.parallel.sequence_parallel and tensor_group is not None,
        recompute=config.training.recompute,
        weights_on_call=config.parallel.zero_stage == 3,
        multi_token=config.multi_token_prediction,
        kernels=kernels,
    )
    layers.reset(config.training.seed, config.model.init_std)
    for layer in layers.all:
        layer.to(device=device, dtype=DTYPES[config.training.precision])
    return layers


def build_transformer(
    config: RunConfig,
    *,
    device: torch.device,
    kernels: Kernels,
    tensor_group: dist.ProcessGroup | None = None,
    context_group: dist.ProcessGroup | None = None,
    eod_id: int | None = None,
) -> Transformer:
    """The model of a run with its initial weights, in the run's precision. eod_id: as in `attention_boundary`."""
    layers = build_run_layers(
        config, device=device, kernels=kernels, tensor_group=tensor_group, context_group=context_group
    )
    return Transformer(layers, eod_id=attention_boundary(config, eod_id), z_loss_weight=config.training.z_loss)

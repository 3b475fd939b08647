"""The over-tokenized transformer straight from the formula: Hugging Face's Olmo2 on embeddings made of dense tables.

One process, n-gram ids over Python's integers, autograd through whole tables, torch's optimizers. Nothing of the
package's numerics is used but its initial weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.derived import attention_windows, table_rate_factor
from overtok_megatron.config.schema import ModelConfig, RunConfig
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.row_store import initial_rows
from support.assembling import cpu_model
from support.later_losses import over_decoding_losses, weighted
from support.multi_token_layers import MultiTokenLayers, block_names


def hugging_face_names(
    model: Transformer, read: Callable[[nn.Parameter], Any] = lambda parameter: parameter
) -> dict[str, Any]:
    """What `read` makes of our dense parameters (themselves, their gradients) by Hugging Face's names, experts joined."""
    word = {} if model.embedding.word is None else {"model.embed_tokens.weight": read(model.embedding.word.weight)}
    names = word | {
        "model.norm.weight": read(model.head.norm.weight),
        "lm_head.weight": read(model.head.output.weight),
    }
    for index, block in enumerate(model.blocks):
        names |= block_names(block, f"model.layers.{index}", read)
    return names


def hugging_face_model(model: ModelConfig, **extra: Any) -> PreTrainedModel:
    """A model of the same shape, float32: Olmoe with experts, Llama with norms before, Olmo3 with windows, else Olmo2."""
    shape = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_word_embeddings,
        "pad_token_id": None,
        "eos_token_id": 0,
        "use_cache": False,
    } | extra
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    scaled = rope
    if model.rope_scaling is not None:
        section = model.rope_scaling.model_dump(exclude_none=True)
        defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if section["type"] == "llama3" else {}
        scaled = rope | defaults | section | {"rope_type": section["type"]}
        del scaled["type"]
        shape["max_position_embeddings"] = int(
            section["factor"] * section.get("original_max_position_embeddings", 1000)
        )
    if model.num_experts is not None:
        experts = {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_token,
            "norm_topk_prob": model.normalize_expert_weights,
        }
        return OlmoeForCausalLM(OlmoeConfig(**shape, **experts, rope_parameters=scaled))
    if model.norm_placement == "pre":
        return LlamaForCausalLM(LlamaConfig(**shape, head_dim=model.head_size, rope_parameters=scaled))
    if model.sliding_window is not None:
        kinds = {None: "full_attention", model.sliding_window: "sliding_attention"}
        layers = {"sliding_window": model.sliding_window, "layer_types": [kinds[w] for w in attention_windows(model)]}
        angles = {"full_attention": scaled, "sliding_attention": rope}
        return Olmo3ForCausalLM(Olmo3Config(**shape, **layers, rope_parameters=angles))
    return Olmo2ForCausalLM(Olmo2Config(**shape, rope_parameters=scaled))


def python_ngram_row(
    tokens: list[int], t: int, order: int, base: int, rows: int, pad: int, eod: int, reset: bool
) -> int:
    """Row of the n-gram that ends at t: the polynomial over unbounded integers, one remainder at the end."""
    total = 0
    hidden = False
    for back in range(order):
        position = t - back
        if back > 0 and position >= 0 and reset and tokens[position] == eod:
            hidden = True
        token = pad if position < 0 or hidden else tokens[position]
        total += token * base**back
    return total % rows


def python_row_id(table: int, row: int, sizes: Sequence[int], stripes: int) -> int:
    """The row id of a table's row.

    Rows are numbered row by row over all tables; consecutive numbers go to different stripes of the row space.
    """
    smallest = min(sizes)
    if row < smallest:
        number = row * len(sizes) + table
    else:
        number = smallest * len(sizes) + sum(size - smallest for size in sizes[:table]) + row - smallest
    length = sum(sizes) // stripes
    if number >= length * stripes:
        return number
    return (number * 2533) % stripes * length + number // stripes


def table_kinds(config: RunConfig) -> list[tuple[int, int, bool]]:
    """Of each table: the order that it hashes, its rows, whether they are frozen."""
    over = config.over_encoding
    assert over.table_rows is not None
    groups = [(list(range(2, over.ngram_order + 1)), over.num_slices, over.table_rows, over.frozen)]
    groups += [(group.orders, group.num_slices, group.table_rows, group.frozen) for group in over.added]
    kinds = []
    for orders, slices, rows, frozen in groups:
        tables = [order for order in orders for _ in range(slices)]
        kinds += [(order, rows + 2 * number, frozen) for number, order in enumerate(tables)]
    return kinds


class Reference:
    """A model that trains step by step on global batches [G, s + 1 + D']; `step` returns the mean cross entropy."""

    def __init__(self, config: RunConfig, eod_id: int) -> None:
        self.config = config
        self.eod_id = eod_id
        ours = cpu_model(config, eod_id=eod_id).float()
        self.model = hugging_face_model(config.model)
        state = {name: weight.detach().clone() for name, weight in hugging_face_names(ours).items()}
        if not config.over_encoding.word_embedding:
            state["model.embed_tokens.weight"] = torch.zeros_like(self.model.model.embed_tokens.weight)
            self.model.model.embed_tokens.weight.requires_grad_(False)
        self.model.load_state_dict(state)
        self.space = row_space(config.model, config.over_encoding)
        rows = initial_rows(
            0, self.space.total_rows, self.space.width, config.over_encoding.init_std, config.training.seed
        )
        self.tables = [nn.Parameter(rows[self.space.row_ids_of_table(table)]) for table in range(self.space.num_tables)]
        self.kinds = table_kinds(config)
        assert ours.embedding.over_encoding is not None
        weights = [
            weight.detach() for weight in ours.embedding.over_encoding.parameters()
        ]  # [d, B w], then one a group
        parts = torch.cat(weights, dim=1).split(self.space.width, dim=1)
        self.projections = nn.ParameterList([part.clone() for part in parts])
        own = {name: weight for name, weight in ours.named_parameters() if name.startswith("over_decoding.")}
        self.heads = {name: nn.Parameter(weight.detach().clone()) for name, weight in own.items()}
        self.multi_token = MultiTokenLayers(ours, self.model, config)
        self.later: list[dict[str, float]] = []  # per step: the losses of heads for later tokens, by name
        self._build_optimizers()
        self.norms: list[float] = []  # before clipping, a step each
        self.square_sums = [torch.zeros(size, dtype=torch.float64) for size in self.space.sizes]

    def rows(self) -> Tensor:
        """The rows of all tables, each where it lies in the row space."""
        result = torch.empty(self.space.total_rows, self.space.width)
        for number, table in enumerate(self.tables):
            result[self.space.row_ids_of_table(number)] = table.detach()
        return result

    def _build_optimizers(self) -> None:
        settings, over = self.config.optimizer, self.config.over_encoding
        spared = [] if self.config.model.tie_word_embeddings else [self.model.model.embed_tokens.weight]
        layers = [*self.model.parameters(), *self.multi_token.parameters()]
        spared += [parameter for parameter in layers if parameter.ndim < 2]
        decayed = [p for p in layers if all(p is not other for other in spared)] + [
            *self.projections,
            *self.heads.values(),
        ]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        self.dense = [*decayed, *spared]
        self.adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
        factor = settings.learning_rate * table_rate_factor(self.config)
        self.table_optimizer: torch.optim.Optimizer | None = None
        if over.optimizer == "adam":
            self.table_optimizer = torch.optim.SparseAdam(self.tables, lr=factor, betas=over.betas, eps=over.eps)
        elif over.optimizer == "sgd":
            self.table_optimizer = torch.optim.SGD(self.tables, lr=factor)

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's input [G, s, d], and the rows that each table was asked for."""
        over = self.config.over_encoding
        total = self.model.model.embed_tokens(tokens)
        share = 1.0 / (1 + (over.ngram_order - 1) * over.num_slices)  # also with added tables
        ngrams = torch.zeros_like(total)
        asked = []
        for (order, size, _), rows, projection in zip(self.kinds, self.tables, self.projections, strict=True):
            ids = [
                [
                    python_ngram_row(
                        line,
                        t,
                        order,
                        over.hash_base or self.config.model.vocab_size,
                        size,
                        over.pad_id,
                        self.eod_id,
                        over.boundary == "reset",
                    )
                    for t in range(len(line))
                ]
                for line in tokens.tolist()
            ]
            asked.append(torch.tensor(ids))
            ngrams = ngrams + rows[asked[-1]] @ projection.t()
        combined = {"sum": total + ngrams, "mean": (total + ngrams) * share, "scaled": total + ngrams * share}
        return combined[over.combine], asked

    def router_loss(self, logits: Sequence[Tensor], batch_size: int) -> Tensor:
        """Of logits [G s, E], a layer each: the mean over layers and micro-batches, whose shares of experts are their own."""
        model, micro_batches = self.config.model, batch_size // self.config.training.micro_batch_size
        experts, chosen = model.num_experts, model.num_experts_per_token
        assert chosen is not None
        parts = []
        for layer in logits:
            for part in layer.chunk(micro_batches):
                balance = load_balancing_loss_func((part,), experts, chosen) / chosen
                square = part.logsumexp(-1).square().mean()
                parts.append(model.router_aux_loss_weight * balance + model.router_z_loss_weight * square)
        return torch.stack(parts).mean()

    def mask(self, tokens: Tensor) -> Tensor | None:
        """[G, 1, s, s] bool, which positions each attends to, where that is not simply all before it."""
        if self.config.data.document_attention == "across":
            return None
        lines = [
            [[u <= t and self.eod_id not in line[u:t] for u in range(len(line))] for t in range(len(line))]
            for line in tokens.tolist()
        ]
        return torch.tensor(lines).unsqueeze(1)

    @torch.no_grad()
    def loss(self, batch: Tensor) -> float:
        """Mean cross entropy of [G, s + 1] without a step."""
        tokens, targets = self.inputs_and_targets(batch)
        logits = self.model(inputs_embeds=self.embed(tokens)[0], attention_mask=self.mask(tokens)).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    def inputs_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Of [G, s + 1], or more tokens for heads of later tokens."""
        length = self.config.data.seq_length
        return batch[:, :length], batch[:, 1 : 1 + length]

    def step(self, batch: Tensor) -> float:
        tokens, targets = self.inputs_and_targets(batch)
        length, depth = tokens.shape[1], self.config.multi_token_prediction.depth
        known = torch.where(batch == IGNORE_INDEX, 0, batch)[:, : length + depth]
        embedded, asked = self.embed(known)  # n-grams look back only, so these are also those of the tokens alone
        result = self.model(
            inputs_embeds=embedded[:, :length],
            attention_mask=self.mask(tokens),
            output_hidden_states=True,
            **({"output_router_logits": True} if self.config.model.num_experts else {}),
        )
        logits = result.logits
        cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        objective = cross_entropy + self.config.training.z_loss * logits.logsumexp(-1).square().mean()
        if self.config.model.num_experts:
            objective = objective + self.router_loss(result.router_logits, batch.shape[0])
        later = over_decoding_losses(result.hidden_states[-1], self.heads, batch, self.config, self.eod_id)
        objective = objective + weighted(later, self.config)
        if depth:
            hidden, mask = result.hidden_states[-1], self.mask(tokens)
            depths, routers = self.multi_token.losses(hidden, embedded, batch, mask, self.eod_id)
            later |= depths
            section = self.config.multi_token_prediction
            objective = objective + section.loss_weight / depth * torch.stack([*depths.values()]).sum()
            if routers and section.loss_weight:
                objective = objective + depth / self.config.model.num_layers * self.router_loss(routers, batch.shape[0])
        self.later.append({name: loss.item() for name, loss in later.items()})
        for parameter in [*self.dense, *self.tables]:
            parameter.grad = None
        objective.backward()
        limit = self.config.optimizer.gradient_clipping
        moving = [rows for (*_, frozen), rows in zip(self.kinds, self.tables, strict=True) if not frozen]
        norm = torch.nn.utils.clip_grad_norm_([*self.dense, *moving], limit or float("inf"))
        self.norms.append(norm.item())
        self.adamw.step()
        self._update_tables(asked)
        return cross_entropy.item()

    @torch.no_grad()
    def _update_tables(self, asked: list[Tensor]) -> None:
        over = self.config.over_encoding
        rate = self.config.optimizer.learning_rate * table_rate_factor(self.config)
        for table, rows in enumerate(self.tables):
            touched = asked[table].unique()
            if self.kinds[table][2]:
                rows.grad = None
                continue
            assert rows.grad is not None
            grad = rows.grad[touched]
            rows[touched] *= 1.0 - rate * over.weight_decay
            if over.optimizer == "rowwise_adagrad":
                self.square_sums[table][touched] += grad.double().square().mean(1)
                scale = self.square_sums[table][touched].sqrt() + over.eps
                rows[touched] -= (rate * grad.double() / scale[:, None]).float()
            else:
                rows.grad = torch.sparse_coo_tensor(touched[None], grad, rows.shape, check_invariants=False).coalesce()
        if self.table_optimizer is not None:
            self.table_optimizer.step()

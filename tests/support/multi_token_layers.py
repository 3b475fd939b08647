"""Multi-token prediction by transformers' own layer, `MtpLayer`, on our weights: the reference of runs and of one forward pass.

Shapes: G sequences, s positions of each, D depths, d hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpLayer

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.derived import attention_windows
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.moe import MixtureOfExperts
from overtok_megatron.model.norm import RMSNormOfSum
from overtok_megatron.model.transformer import Transformer
from support.later_losses import scored_targets


def block_names(block: Any, prefix: str, read: Callable[[nn.Parameter], Any]) -> dict[str, Any]:
    """As `hugging_face_names`, of one block whose names begin with `prefix`."""
    names: dict[str, Any] = {}
    attention, mlp = block.attention, block.mlp
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    if isinstance(block.mlp_norm, RMSNormOfSum):
        norms = ("input_layernorm", "post_attention_layernorm")
    for letter in "qkv":
        names[f"{prefix}.self_attn.{letter}_proj.weight"] = read(getattr(attention.qkv, f"{letter}_proj"))
    names |= {
        f"{prefix}.self_attn.o_proj.weight": read(attention.o_proj.weight),
        f"{prefix}.{norms[0]}.weight": read(block.attention_norm.weight),
        f"{prefix}.{norms[1]}.weight": read(block.mlp_norm.weight),
    }
    if attention.q_norm is not None:
        names[f"{prefix}.self_attn.q_norm.weight"] = read(attention.q_norm.weight)
        names[f"{prefix}.self_attn.k_norm.weight"] = read(attention.k_norm.weight)
    if isinstance(mlp, MixtureOfExperts):
        names |= {
            f"{prefix}.mlp.gate.weight": read(mlp.router),
            f"{prefix}.mlp.experts.gate_up_proj": torch.cat([read(mlp.experts_gate), read(mlp.experts_up)], dim=1),
            f"{prefix}.mlp.experts.down_proj": read(mlp.experts_down),
        }
    else:
        names |= {
            f"{prefix}.mlp.gate_proj.weight": read(mlp.gate_up.gate_proj),
            f"{prefix}.mlp.up_proj.weight": read(mlp.gate_up.up_proj),
            f"{prefix}.mlp.down_proj.weight": read(mlp.down_proj.weight),
        }
    return names


def multi_token_names(
    model: Transformer, read: Callable[[nn.Parameter], Any] = lambda parameter: parameter
) -> dict[str, Any]:
    """What `read` makes of our parameters by the names that they have in `MultiTokenLayers`."""
    names: dict[str, Any] = {}
    for index, layer in enumerate([] if model.multi_token is None else model.multi_token.layers):
        prefix = f"layers.{index}"
        names |= {
            f"{prefix}.enorm.weight": read(layer.embedding_norm.weight),
            f"{prefix}.hnorm.weight": read(layer.hidden_norm.weight),
            f"{prefix}.eh_proj.weight": read(layer.projection.weight),
            f"{prefix}.post_norm.weight": read(layer.norm.weight),
        }
        names |= block_names(layer.block, f"{prefix}.mtp_block", read)
    return names


class MultiTokenLayers(nn.Module):
    """An `MtpLayer` per depth around decoder layers of a model's kind, with full attention; none without such heads."""

    def __init__(self, ours: Transformer, model: PreTrainedModel, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        decoder = model.get_decoder()
        windows = attention_windows(config.model)
        full = windows.index(None) if None in windows else 0
        kinds = type(decoder.layers[0]), type(decoder.norm)
        depth = config.multi_token_prediction.depth
        self.layers = nn.ModuleList(MtpLayer(model.config, *kinds, layer_idx=full) for _ in range(depth))
        self._model = (model,)  # in a tuple, so that it is not a part of this module
        weights = {name: weight.detach().clone() for name, weight in multi_token_names(ours).items()}
        self.load_state_dict(weights)

    def losses(
        self, hidden: Tensor, embedded: Tensor, batch: Tensor, mask: Tensor | None, eod_id: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Mean cross entropy of each depth by name, and with experts the logits of each router, [G s, E].

        hidden [G, s, d] after the final norm; embedded [G, s + D, d]; batch [G, s + 1 + D]; mask [G, 1, s, s] bool.
        """
        (model,) = self._model
        length = hidden.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        rotary = model.get_decoder().rotary_emb
        kind = ("full_attention",) if hasattr(model.config, "layer_types") else ()
        angles = rotary(hidden, positions, *kind)
        end = eod_id if self.config.data.document_attention == "within" else None
        losses, routers = {}, []
        for index, layer in enumerate(self.layers):
            depth = index + 1
            if self.config.model.num_experts:
                gate = layer.mtp_block.mlp.gate
                hook = gate.register_forward_hook(lambda _, __, result: routers.append(result[0]))
            hidden = layer(embedded[:, depth : depth + length], hidden, angles, mask, positions, None)
            if self.config.model.num_experts:
                hook.remove()
            targets = scored_targets(batch, length, depth + 1, end)
            losses[f"multi_token_{depth}"] = nn.functional.cross_entropy(
                model.lm_head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
            )
        return losses, routers

"""Names of dense weights in Hugging Face's files, and the weights in both directions, one after the other. Pure."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.config.schema import ModelConfig
from overtok_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Half:
    """The first (0) or second (1) half of a tensor along dimension 1."""

    name: str
    index: int


WORD = "embedding.word.weight"  # our name of the 1-gram embedding

Source = str | list[str] | Half  # one tensor, one tensor per expert, or a half of one


def hugging_face_names(model: ModelConfig, *, fused: bool = False) -> dict[str, Source]:
    """Our name of each dense weight -> what holds that weight in Hugging Face's files, in the order of the model.

    The experts of a layer are one tensor here. There they are one tensor per expert, or together where `fused`, as
    transformers 5 has them in memory.
    """
    names: dict[str, Source] = {WORD: "model.embed_tokens.weight"}
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        names |= _attention_names(model, f"{ours}.attention", f"{theirs}.self_attn")
        if model.num_experts is None:
            for part in ("gate", "up"):
                names[f"{ours}.mlp.gate_up.{part}_proj"] = f"{theirs}.mlp.{part}_proj.weight"
            names[f"{ours}.mlp.down_proj.weight"] = f"{theirs}.mlp.down_proj.weight"
        else:
            names[f"{ours}.mlp.router"] = f"{theirs}.mlp.gate.weight"
            names |= _expert_names(model.num_experts, f"{ours}.mlp", f"{theirs}.mlp.experts", fused=fused)
        names |= _norm_names(model, ours, theirs)
    names["head.norm.weight"] = "model.norm.weight"
    if not model.tie_word_embeddings:
        names["head.output.weight"] = "lm_head.weight"
    return names


def _attention_names(model: ModelConfig, ours: str, theirs: str) -> dict[str, Source]:
    names: dict[str, Source] = {f"{ours}.qkv.{letter}_proj": f"{theirs}.{letter}_proj.weight" for letter in "qkv"}
    names[f"{ours}.o_proj.weight"] = f"{theirs}.o_proj.weight"
    if model.qk_norm == "full":
        names |= {f"{ours}.{letter}_norm.weight": f"{theirs}.{letter}_norm.weight" for letter in "qk"}
    return names


def _expert_names(num_experts: int, ours: str, theirs: str, *, fused: bool) -> dict[str, Source]:
    if fused:
        gate_up = f"{theirs}.gate_up_proj"
        return {
            f"{ours}.experts_gate": Half(gate_up, 0),
            f"{ours}.experts_up": Half(gate_up, 1),
            f"{ours}.experts_down": f"{theirs}.down_proj",
        }
    return {
        f"{ours}.experts_{part}": [f"{theirs}.{expert}.{part}_proj.weight" for expert in range(num_experts)]
        for part in ("gate", "up", "down")
    }


def _norm_names(model: ModelConfig, ours: str, theirs: str) -> dict[str, Source]:
    """Norms before or after attention and feed-forward; transformers names them by what comes before each norm."""
    norms = ("input", "post_attention") if model.norm_placement == "pre" else ("post_attention", "post_feedforward")
    return {
        f"{ours}.{own}.weight": f"{theirs}.{norm}_layernorm.weight"
        for own, norm in zip(("attention_norm", "mlp_norm"), norms, strict=True)
    }


def to_ours(
    model: ModelConfig, available: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our weights out of Hugging Face's, one after the other. available: their names in the folder; read: one of them.

    Raises CheckpointError where a weight is missing, or is not one of the model.
    """
    there = set(available)
    unused = set(there)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in there)
    for ours, source in hugging_face_names(model, fused=fused).items():
        needed = source if isinstance(source, list) else [source.name if isinstance(source, Half) else source]
        missing = [name for name in needed if name not in there]
        if missing:
            raise CheckpointError(f"the folder holds no weight {missing[0]}")
        unused -= set(needed)
        if isinstance(source, list):
            yield ours, torch.stack([read(name) for name in source])
        elif isinstance(source, Half):
            yield ours, read(source.name).chunk(2, dim=1)[source.index].clone()
        else:
            yield ours, read(source)
    if model.tie_word_embeddings:
        unused.discard("lm_head.weight")  # the word embedding once more
    unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq")}  # of old releases; not trained
    if unused:
        raise CheckpointError(f"the folder holds a weight {min(unused)}, which this model has no place for")


def to_theirs(
    model: ModelConfig, dense: Iterable[tuple[str, Tensor]], *, fused: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's weights out of ours, one after the other; names that are not of the backbone stay."""
    names = hugging_face_names(model, fused=fused)
    halves: dict[str, Tensor] = {}
    for ours, weight in dense:
        target = names.get(ours, ours)
        if isinstance(target, str):
            yield target, weight
        elif isinstance(target, list):
            yield from zip(target, weight.unbind(0), strict=True)
        elif target.name in halves:
            other = halves.pop(target.name)
            yield target.name, torch.cat([weight, other] if target.index == 0 else [other, weight], dim=1)
        else:
            halves[target.name] = weight
    assert not halves, "half a tensor is left"

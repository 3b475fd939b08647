"""Decoding with grouped queries: no copy of the cache, and the result is that of repeated keys and values."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.attention import Attention, AttentionShape, DecodeStep
from overtok_megatron.model.cache import KVCache
from overtok_megatron.model.rotary import Rotary

HEADS, KV_HEADS, SIZE, HIDDEN, COLUMNS = 6, 2, 8, 24, 11


def made_attention() -> Attention:
    shape = AttentionShape(
        hidden_size=HIDDEN, num_heads=HEADS, num_key_value_heads=KV_HEADS, head_size=SIZE, qk_norm_epsilon=1e-6
    )
    layer = Attention(shape, window=None, rotary=Rotary(SIZE, 1e4), layer_index=0, kernels=Kernels())
    layer.reset(0, "attention", 0.3)
    return layer


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_reads_the_cache_in_place(batch: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made_attention()
    cache = KVCache(
        batch=batch, columns=COLUMNS, num_layers=1, num_key_value_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    calls: list[tuple[Tensor, ...]] = []
    true = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        assert arguments.keys() == {"attn_mask"}
        out = true(q, k, v, **arguments)
        calls.append((q, k, v, arguments["attn_mask"], out))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    generator = torch.Generator().manual_seed(count)
    for new in (3, count):
        columns = cache.append(torch.ones(batch, new, dtype=torch.int64))
        seen = torch.arange(int(columns[0, -1]) + 1)
        mask = (seen <= columns.unsqueeze(2)).expand(batch, new, -1).clone()
        mask[0, :, 1] = False  # not the same for all sequences
        step = DecodeStep(
            positions=columns.expand(batch, new), mask=mask.unsqueeze(1), sliding_mask=mask.unsqueeze(1), cache=cache
        )
        with torch.no_grad():
            layer(torch.randn(batch, new, HIDDEN, generator=generator), step)
    q, k, v, _, out = calls[-1]
    for keys, store in ((k, cache.keys[0]), (v, cache.values[0])):
        assert keys.shape == (batch, KV_HEADS, 3 + count, SIZE) and keys.data_ptr() == store.data_ptr()
    q, out = (x.unflatten(2, (HEADS // KV_HEADS, count)).flatten(1, 2) for x in (q, out))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    torch.testing.assert_close(out, true(q, k, v, attn_mask=mask.unsqueeze(1)), rtol=1e-6, atol=1e-6)

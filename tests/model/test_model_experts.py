"""Products by expert against einsum, in both ways; what a mixture computes does not depend on how its tokens are cut."""

import pytest
import torch

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.grouped import grouped_linear, outer_products, products
from overtok_megatron.model.moe import MixtureOfExperts, RoutingRule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 4, 4, 0]])
def test_both_ways_of_products_by_expert(dtype: torch.dtype, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sum(counts)
    x, grad = (torch.randn(rows, size, generator=generator).to(dtype) for size in (16, 8))
    weight = torch.randn(4, 8, 16, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0)
    chosen = torch.nn.functional.one_hot(torch.arange(4).repeat_interleave(torch.tensor(counts)), 4).double()
    forward = torch.einsum("ni,eoi,ne->no", x.double(), weight.double(), chosen)
    outer = torch.einsum("no,ni,ne->eoi", grad.double(), x.double(), chosen)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for grouped in (False, True):
        ours = products(x, weight.mT, ends, grouped=grouped)
        torch.testing.assert_close(ours.double(), forward, **tolerance)
        torch.testing.assert_close(outer_products(grad, x, ends, grouped=grouped).double(), outer, **tolerance)
    leaf = weight.clone().requires_grad_()
    grouped_linear(x, leaf, ends).backward(grad)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), outer, **tolerance)
    assert all((leaf.grad[expert] == 0).all() for expert in range(4) if counts[expert] == 0)


def test_tokens_do_not_see_each_other() -> None:
    """The output of a token among others is that of the token alone: nothing is dropped, whatever its experts' load."""
    rule = RoutingRule(num_experts=5, experts_per_token=2, normalize_weights=False, balance_weight=0.1, z_weight=0.0)
    mixture = MixtureOfExperts(hidden_size=12, intermediate_size=10, rule=rule, kernels=Kernels())
    mixture.reset(1, "mixture", 0.3)
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    x[:, 2:] = x[:1, :1]  # most tokens choose the same experts
    out, (loss, _) = mixture(x)
    for sequence in range(3):
        for position in range(7):
            alone, _ = mixture(x[sequence : sequence + 1, position : position + 1])
            torch.testing.assert_close(out[sequence, position], alone[0, 0], rtol=1e-5, atol=1e-6)
    assert loss.item() > 0.1 * 21  # 1 a token is what an even load gives

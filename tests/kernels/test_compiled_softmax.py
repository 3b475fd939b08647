"""The softmax passes as Inductor compiles them, here for the CPU, against float64; what the compiler allocates and writes."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from overtok_megatron.kernels import choice, reference
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.compiled_softmax import compiled_softmax

COLUMNS = 1003
Z_LOSS = 0.01


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    torch._dynamo.reset()
    return compiled_softmax()


def inputs(rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose last three columns are padding, targets of which one is not a column, and which rows are scored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(rows, COLUMNS, generator=generator)).to(dtype)
    logits[:, -3:] = -torch.inf
    target = torch.randint(0, COLUMNS - 3, (rows,), generator=generator)
    scored = torch.ones(rows, dtype=torch.bool)
    if rows > 2:
        target[:3], scored[1] = torch.tensor([0, -1, COLUMNS]), False
    return logits, target, scored


def exact(logits: Tensor, target: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-sum-exp, target logit, the factor of the softmax, and the gradient, in float64."""
    wide = logits.double()
    log_sum = wide.logsumexp(1)
    here = torch.arange(COLUMNS) == target.unsqueeze(1)
    target_logit = torch.where(here.any(1), torch.where(here, wide, 0.0).sum(1), -torch.inf)
    scale = torch.where(scored, 1 + 2 * Z_LOSS * log_sum, 0.0)
    return log_sum, target_logit, scale, wide.softmax(1) * scale.unsqueeze(1) - here.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_one_compilation_for_any_number_of_rows(compiled: dict[str, Any], dtype: torch.dtype) -> None:
    rounding = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    for turn, rows in enumerate((6, 13, 2, 1, 40)):
        logits, target, scored = inputs(rows, dtype, seed=turn)
        log_sum, target_logit, scale, gradient = exact(logits, target, scored)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            largest, exp_sum = compiled["softmax_statistics"](logits)
            split = logits.clone()
            assert compiled["softmax_gradient"](split, log_sum.float(), scale.float(), target) is None
            found = compiled["softmax_loss_and_gradient"](logits, target, scored, Z_LOSS)
        torch.testing.assert_close((exp_sum.log() + largest).double(), log_sum, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[0].double(), log_sum, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[1].double(), target_logit)
        for written in (split, logits):
            assert written.dtype == dtype
            torch.testing.assert_close(written.double(), gradient, **rounding)


def test_nothing_of_the_size_of_the_logits_is_allocated() -> None:
    logits, target, scored = inputs(9, torch.bfloat16)
    columns = torch.zeros(9)
    for name, others in {
        "softmax_statistics": (),
        "softmax_gradient": (columns, columns, target),
        "softmax_loss_and_gradient": (target, scored, Z_LOSS),
    }.items():
        torch._dynamo.reset()
        _, sources = run_and_get_code(compiled_softmax()[name], logits.clone(), *others)
        (source,) = sources
        allocated = re.findall(r"= empty_strided_cpu\(\((.*?)\)", source)
        assert allocated or name == "softmax_gradient"
        assert not [shape for shape in allocated if str(COLUMNS) in shape], f"{name} allocates {allocated}"


def test_a_chunk_without_columns(compiled: dict[str, Any]) -> None:
    """The shard of a rank that holds none of a tiny vocabulary."""
    largest, exp_sum = compiled["softmax_statistics"](torch.empty(4, 0))
    assert torch.equal(largest, torch.full((4,), -torch.inf))
    assert not exp_sum.any()
    compiled["softmax_gradient"](torch.empty(4, 0), largest, exp_sum, torch.zeros(4, dtype=torch.int64))


def test_nan_stays_nan(compiled: dict[str, Any]) -> None:
    logits, target, scored = inputs(4, torch.float32)
    logits[2, 17] = torch.nan
    log_sum, _ = compiled["softmax_loss_and_gradient"](logits, target, scored, Z_LOSS)
    assert log_sum.isnan().tolist() == [False, False, True, False]
    assert logits.isnan().any(1).tolist() == [False, False, True, False]


def test_cuda_takes_them_unless_torch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "apex_parts", lambda: None)
    monkeypatch.setattr(choice, "_cuda_row_kernels", choice.RowKernels)
    cuda = torch.device("cuda", 0)
    assert choose_kernels("torch", cuda).softmax_loss_and_gradient is reference.softmax_loss_and_gradient
    assert choose_kernels("auto", cuda).softmax_loss_and_gradient is not reference.softmax_loss_and_gradient
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)  # Inductor needs Triton on CUDA
    assert choose_kernels("auto", cuda).softmax_loss_and_gradient is reference.softmax_loss_and_gradient

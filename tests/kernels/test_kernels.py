"""The compiled loops against torch's operators, forward and in every gradient; threads, NaN, odd sizes; the choice itself."""

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from overtok_megatron.config.schema import KernelChoice
from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import build, choice, reference
from overtok_megatron.kernels.choice import Kernels, apex_parts, choose_kernels, choose_row_kernels

CPU = torch.device("cpu")
# relative to the norm of the float64 result; bfloat16 keeps 8 bits of mantissa
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.fixture
def loops() -> Kernels:
    kernels = choose_kernels("auto", CPU)
    assert kernels.name == "cpu", "this machine has no C++ compiler"
    return kernels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    turn = normal(length, 1, size // 2, seed=9)
    return turn.cos().float(), turn.sin().float()


def check_swiglu(kernels: Kernels, dtype: torch.dtype, x: Tensor) -> None:
    """The loop in `dtype` against the reference in float64, on the same rounded input."""
    results = []
    for chosen, kind in ((kernels, dtype), (Kernels(), torch.float64)):
        leaf = x.to(dtype).to(kind).requires_grad_()
        out = chosen.swiglu(leaf)
        results.append([out, *torch.autograd.grad(out, leaf, normal(*out.shape, seed=5).to(dtype).to(kind))])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 6, 34, 600])
def test_passes(loops: Kernels, dtype: torch.dtype, size: int) -> None:
    # RMSNorm's reference computes in float32 whatever comes in
    x, weight = normal(3, 5, size), normal(size, seed=1)
    out, grads = _norm(loops, dtype, x, weight)
    exact, exact_grads = _norm(Kernels(), dtype, x, weight)
    for ours, wanted in zip([out, *grads], [exact, *exact_grads], strict=True):
        assert (ours.double() - wanted.double()).norm() <= TOLERANCE[dtype] * wanted.double().norm()
    check_swiglu(loops, dtype, normal(3, 5, size))


def _norm(kernels: Kernels, dtype: torch.dtype, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    wide = torch.cat([leaves[0], leaves[0]], dim=-1)[..., : x.shape[-1]]  # strided: a part of a larger row
    out = kernels.rms_norm(wide, leaves[1], 1e-6)
    return out, torch.autograd.grad(out, leaves, normal(*out.shape, seed=5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "window"),
    [(1, None), (63, None), (256, None), (257, None), (520, None),
     (1, 1), (63, 2), (63, 7), (63, 63), (63, 64), (256, 255), (257, 100), (520, 256), (777, 300)],
)  # fmt: skip
def test_attention_of_any_length(loops: Kernels, dtype: torch.dtype, length: int, window: int | None) -> None:
    inputs = [normal(2, 3, length, 8, seed=seed) for seed in range(3)]
    tolerance = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)  # scores and probabilities are rounded, too
    results = []
    for kernels, kind in ((loops, dtype), (Kernels(), torch.float64)):
        leaves = [
            value.to(dtype).to(kind).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for value in inputs
        ]
        out = kernels.causal_attention(*leaves, window)
        results.append([out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=7).to(dtype).to(kind))])
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_back(loops: Kernels, dtype: torch.dtype) -> None:
    x = normal(2, 7, 3, 10).to(dtype).requires_grad_()
    cos, sin = angles(7, 10)
    for turn in ((cos, sin), (cos.expand(2, 7, 1, 5).contiguous(), sin.expand(2, 7, 1, 5).contiguous())):
        ours, theirs = loops.rotate(x, *turn), reference.rotate(x, *turn)
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
        grads = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 31, 33, 1000])
def test_softmax(loops: Kernels, dtype: torch.dtype, size: int) -> None:
    logits = (20 * normal(4, size)).to(dtype)
    largest, exp_sum = loops.softmax_statistics(logits)
    wanted, wanted_sum = reference.softmax_statistics(logits)
    assert torch.equal(largest, wanted)
    torch.testing.assert_close(exp_sum, wanted_sum, rtol=2e-6, atol=0)
    target, scale = torch.tensor([0, size, -1, size - 1]), torch.tensor([1.0, 1.3, 0.0, 0.5])
    log_sum = exp_sum.log() + largest
    theirs, ours = logits.clone(), logits.clone()
    reference.softmax_gradient(theirs, log_sum, scale, target)
    loops.softmax_gradient(ours, log_sum, scale, target)
    torch.testing.assert_close(ours, theirs, rtol=3e-6 if dtype == torch.float32 else 1e-2, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 31, 33, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_and_gradient_in_one_pass(loops: Kernels, dtype: torch.dtype, size: int, z_loss: float) -> None:
    logits = (20 * normal(4, size)).to(dtype)
    target, scored = torch.tensor([0, size, -1, size - 1]), torch.tensor([True, True, False, True])
    exact = logits.double()
    log_sum = exact.logsumexp(1)
    wanted = exact.softmax(1) * torch.where(scored, 1 + 2 * z_loss * log_sum, 0.0).unsqueeze(1)
    wanted[0, 0] -= 1
    wanted[3, -1] -= 1
    for kernels in (loops, Kernels()):
        written = logits.clone()
        found, target_logit = kernels.softmax_loss_and_gradient(written, target, scored, z_loss)
        torch.testing.assert_close(found.double(), log_sum, rtol=1e-6, atol=1e-6)
        assert target_logit.tolist() == [logits[0, 0], -torch.inf, -torch.inf, logits[3, -1]]
        # log_sum is rounded to float32, here up to 60: 4e-6
        torch.testing.assert_close(written.double(), wanted, rtol=8e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize(("length", "window"), [(9, 1), (9, 4), (600, 7), (600, 299)])
def test_a_window_by_the_formula(length: int, window: int) -> None:
    q, k, v = (normal(1, 2, length, 4, seed=seed) for seed in range(3))
    scores = q @ k.mT / 2.0
    for query in range(length):
        scores[..., query, query + 1 :] = -torch.inf
        scores[..., query, : max(0, query + 1 - window)] = -torch.inf
    torch.testing.assert_close(reference.causal_attention(q, k, v, window), scores.softmax(-1) @ v)


def everything(kernels: Kernels) -> list[Tensor]:
    x = normal(40, 3, 70).float().requires_grad_()
    weight = normal(70).float().requires_grad_()
    out = kernels.swiglu(kernels.rms_norm(x, weight, 1e-6)).unflatten(-1, (7, 5))[..., :4].transpose(1, 2)
    out = kernels.causal_attention(out, out, kernels.rotate(out, *angles(7, 4)))
    return [out, *torch.autograd.grad(out.square().sum(), [x, weight])]


def test_threads_change_nothing(loops: Kernels) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(loops)
        torch.set_num_threads(2)
        two = everything(loops)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_nan_stays_nan(loops: Kernels) -> None:
    x = torch.ones(2, 3, 4, 8)
    x[0, 1, 2, 3] = torch.nan
    assert loops.rms_norm(x, torch.ones(8), 1e-6).isnan().any()
    assert loops.swiglu(x).isnan().any()
    assert loops.rotate(x, *angles(3, 8)).isnan().any()
    assert loops.causal_attention(x, x, x).isnan().any()
    assert loops.softmax_statistics(x.flatten(0, 2))[1].isnan().sum() == 1


@pytest.fixture
def forgotten_library() -> Iterator[None]:
    build.load_library.cache_clear()
    yield
    build.load_library.cache_clear()


@pytest.mark.usefixtures("forgotten_library")
def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert choose_kernels("auto", CPU).name == "torch"


def test_apex_is_recognised_or_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_kernels("apex", CPU)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # the web toolkit of that name
    assert apex_parts() is None


def test_an_offloaded_optimizer_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """apex's AdamW knows CUDA tensors only, and an offloaded one steps on the CPU."""
    made: list[str] = []
    monkeypatch.setattr(choice, "apex_parts", lambda: (None, lambda groups, **settings: made.append("apex")))
    device = torch.device("cuda", 0)
    weights = [{"params": [torch.nn.Parameter(torch.ones(3))]}]
    assert choose_kernels("auto", device).adamw is choice.torch_adamw, "apex was not asked for"
    kernels = choose_kernels("apex", device)
    kernels.choose_adamw(offloaded=False)(weights, 1e-3, (0.9, 0.95), 1e-8)
    assert made == ["apex"]
    assert kernels.choose_adamw(offloaded=True) is choice.torch_adamw


@pytest.mark.skipif(apex_parts() is None or not torch.cuda.is_available(), reason="NVIDIA apex and CUDA are needed")
def test_apex_gives_torchs_numbers() -> None:
    device = torch.device("cuda")
    x, weight = normal(64, 512).to(device, torch.float32), normal(512, seed=1).to(device, torch.float32)
    apex, torch_kernels = choose_kernels("apex", device), choose_kernels("torch", device)
    torch.testing.assert_close(
        apex.rms_norm(x, weight, 1e-6), torch_kernels.rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6
    )
    weights = [torch.nn.Parameter(weight.clone()) for _ in "ab"]
    optimizers = [
        kernels.adamw([{"params": [p]}], 1e-2, (0.9, 0.95), 1e-8)
        for kernels, p in zip((apex, torch_kernels), weights, strict=True)
    ]
    for step in range(5):
        for parameter, optimizer in zip(weights, optimizers, strict=True):
            parameter.grad = normal(512, seed=step).to(device, torch.float32)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_the_choice_names_itself() -> None:
    for device in (CPU, torch.device("cuda", 0)):
        for name in ("torch", "compile"):
            assert choose_kernels(name, device).name == name
    assert choose_kernels("auto", torch.device("cuda", 0)).name == "compile"
    assert choose_kernels("torch", CPU) == Kernels()
    assert choice.Kernels().rms_norm is reference.rms_norm


def test_passes_are_made_of_a_devices_own_norm_and_rotation(loops: Kernels) -> None:
    """To the last bit: the compiled loops are composed, and nothing else computes."""
    x, branch, weight = normal(2, 7, 24).float(), normal(2, 7, 24, seed=1).float(), normal(24, seed=2).float()
    turn = angles(7, 4)
    assert torch.equal(loops.add_normed(x, branch, weight, 1e-6), x + loops.rms_norm(branch, weight, 1e-6))
    total, normed = loops.norm_of_sum(x, branch, weight, 1e-6)
    assert torch.equal(total, x + branch) and torch.equal(normed, loops.rms_norm(total, weight, 1e-6))
    wanted = loops.rotate(loops.rms_norm(x, weight, 1e-6).unflatten(-1, (6, 4)), *turn)
    assert torch.equal(loops.norm_and_rotate(x, weight, 1e-6, *turn, 24, None), wanted)


@pytest.mark.parametrize("name", ["apex", "liger"])
def test_rows_in_host_memory_need_no_cuda_package(name: KernelChoice) -> None:
    assert type(choose_row_kernels(name, CPU)) is type(choose_row_kernels("auto", CPU))


def test_loading_the_library_keeps_subnormal_numbers() -> None:
    build.load_library()
    tiny = float(np.finfo(np.float32).tiny)
    assert float(np.float32(tiny) / np.float32(4.0)) > 0.0
    assert (torch.tensor([tiny]) / 4).item() > 0.0

"""Passes that torch.compile fuses against torch's operators, on the CPU: forward, every gradient, and how often they compile.

`Plain` are functions of the kernels and of leaves that take gradients. n positions, d = 48 values unless said otherwise.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_checks.passes import TOLERANCES, exact_kernels, largest_error, passes
from torch import Tensor
from torch._dynamo.utils import counters

from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, Recompute
from overtok_megatron.errors import ConfigError
from overtok_megatron.kernels import choice, compiled
from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer

CPU = torch.device("cpu")
EPSILON = 1e-6
Plain = Callable[[Kernels, list[Tensor]], tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def fused() -> Kernels:
    return choose_kernels("compile", CPU)


def compilations() -> int:
    count: int = counters["stats"]["unique_graphs"]
    return count


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(*shape: int, size: int) -> tuple[Tensor, Tensor]:
    turn = normal(*shape, 1, size // 2, seed=9)
    return turn.cos(), turn.sin()


def results(kernels: Kernels, plain: Plain, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all leaves."""
    leaves = [value.clone().requires_grad_() for value in values]
    outputs = plain(kernels, leaves)
    incoming = [normal(*out.shape, seed=5).to(out.dtype) for out in outputs]
    return list(outputs), list(torch.autograd.grad(outputs, leaves, incoming))


def check(fused: Kernels, plain: Plain, values: list[Tensor]) -> None:
    """float32: each element to 1e-6 of the largest, each sum over positions (the gradient of a vector) to 1e-5 of it."""
    ours, theirs = (results(kernels, plain, values) for kernels in (fused, Kernels()))
    for mine, wanted in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
        if wanted.dtype == torch.bfloat16:  # each side rounds its result, and torch's operators round in between, too
            torch.testing.assert_close(mine, wanted, rtol=1.6e-2, atol=1e-2 * float(wanted.detach().abs().max()))
            continue
        limit = 1e-5 if wanted.dim() == 1 else 1e-6
        assert (mine - wanted).abs().max() <= limit * wanted.abs().max()


def norm_passes(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    x, branch, weight = leaves
    return (
        kernels.rms_norm(x, weight, EPSILON),
        kernels.add_normed(x, branch, weight, EPSILON),
        *kernels.norm_of_sum(x, branch, weight, EPSILON),
    )


def test_passes_compile_once_for_all_numbers_of_positions(fused: Kernels) -> None:
    """Five positions, then a prime number, and others; a single position is the one exception. Strided inputs, too."""

    def plain(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        x, weight = leaves
        return *kernels.norm_of_sum(x[..., :48], x[..., 48:], weight, EPSILON), kernels.swiglu(x)

    first = compilations()
    check(fused, plain, [normal(1, 5, 96), normal(48)])
    compiled_once = compilations()
    assert compiled_once - first <= 2
    for batch, length in ((1, 23), (3, 5), (7, 1), (2, 64)):
        check(fused, plain, [normal(batch, length, 96, seed=length), normal(48)])
    assert compilations() == compiled_once


@torch.no_grad()
def test_a_part_of_a_row_compiles_once_wherever_it_begins(fused: Kernels) -> None:
    """PyTorch specialises on an offset of 0 in memory, so a later part first and then the first part was compiled anew."""
    before, weight = compilations(), normal(24)
    for length in (5, 7, 11):
        for start in (24, 0):
            x = normal(length, 48)[:, start : start + 24]
            ours, plain = (kernels.rms_norm(x, weight, EPSILON) for kernels in (fused, Kernels()))
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    assert compilations() - before <= 2


def halves_on_two_ranks(kernels: Kernels, x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor]) -> list[Tensor]:
    """norm_and_rotate of [b, s, h e] whose heads two ranks hold, each a thread: outputs and gradients, joined again."""
    both, parts = threading.Barrier(2), [torch.empty(0)] * 2
    found: dict[int, list[Tensor]] = {}

    def run(rank: int) -> None:
        def sum_over_ranks(values: Tensor) -> None:
            parts[rank] = values.clone()
            both.wait(200)
            values.copy_(parts[0] + parts[1])
            both.wait(200)

        size = x.shape[-1] // 2
        own = slice(rank * size, (rank + 1) * size)
        leaves = [x[..., own].detach().requires_grad_(), weight[own].detach().requires_grad_()]
        out = kernels.norm_and_rotate(*leaves, EPSILON, *turn, x.shape[-1], sum_over_ranks)
        incoming = normal(*x.shape, seed=5).to(x.dtype)[..., own].view(out.shape)
        found[rank] = [out.detach().flatten(-2), *torch.autograd.grad(out, leaves, incoming)]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [torch.cat(pair, dim=-1) for pair in zip(found[0], found[1], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.ci)])
def test_a_norm_of_heads_on_two_ranks_equals_the_whole(fused: Kernels, dtype: torch.dtype) -> None:
    x, weight, turn = normal(3, 5, 48).to(dtype), normal(48, seed=1).to(dtype), angles(5, size=8)

    def whole(kernels: Kernels, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        out = kernels.norm_and_rotate(leaves[0], leaves[1], EPSILON, *turn, 48, None)
        return (out.flatten(-2),)

    outputs, gradients = results(exact_kernels(), whole, [x.double(), weight.double()])
    limit = 1e-6 if dtype == torch.float32 else TOLERANCES[dtype]
    for kernels in (fused, Kernels()):
        assert largest_error(halves_on_two_ranks(kernels, x, weight, turn), [*outputs, *gradients]) <= limit


@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_of_every_shape(fused: Kernels, dtype: torch.dtype) -> None:
    before = compilations()
    for batch, length in ((1, 1), (1, 7), (2, 13), (3, 1), (1, 127), (13, 2)):
        for size in (48, 96):
            values = [normal(batch, length, size, seed=seed).to(dtype) for seed in (1, 2)]
            check(fused, norm_passes, [*values, normal(size).to(dtype)])
            check(fused, lambda kernels, leaves: (kernels.swiglu(leaves[0]),), values[:1])
        for head_size, shape in ((2, (length,)), (2, (batch, length)), (64, (length,)), (64, (batch, length))):
            turn = angles(*shape, size=head_size)

            def turned(
                kernels: Kernels, leaves: list[Tensor], turn: tuple[Tensor, Tensor] = turn, head_size: int = head_size
            ) -> tuple[Tensor, ...]:
                x = leaves[0][..., 8:136]  # as queries lie beside keys and values
                return (
                    kernels.rotate(x.unflatten(-1, (-1, head_size)), *turn),
                    kernels.norm_and_rotate(x, leaves[1], EPSILON, *turn, 128, None),
                )

            check(fused, turned, [normal(batch, length, 200).to(dtype), normal(128).to(dtype)])
    # at most 4 passes of 2 sizes with many and with one position; 2 rotations of 2 sizes with these and with shared angles
    assert compilations() - before <= 4 * 2 * 2 + 2 * 2 * 3


@pytest.mark.ci
def test_the_check_of_a_gpu_holds_on_the_cpu(fused: Kernels) -> None:
    for name, case in passes(2, 19, 64, 16, CPU).items():
        exact = case.run(exact_kernels(), torch.float64, CPU)
        for dtype in TOLERANCES:
            assert largest_error(case.run(fused, dtype, CPU), exact) <= TOLERANCES[dtype], name
            assert largest_error(case.run(Kernels(), dtype, CPU), exact) <= TOLERANCES[dtype], name


def model(kernels: Kernels, recompute: Recompute, **changes: Any) -> Transformer:
    values = {"vocab_size": 59, "hidden_size": 48, "intermediate_size": 48, "num_layers": 2, "num_attention_heads": 6,
              "num_key_value_heads": 2} | changes  # fmt: skip
    layers = build_layers(
        ModelConfig.model_validate(values), OverEncodingConfig(), kernels=kernels, recompute=recompute
    )
    layers.reset(seed=1, std=0.1)
    return Transformer(layers)


def losses_and_gradients(trained: Transformer, tokens: Tensor) -> list[Tensor]:
    trained.zero_grad()
    result = trained(tokens[:, :-1], None, tokens[:, 1:])
    result.objective.backward()
    return [result.main_loss.detach(), *(weight.grad for weight in trained.parameters() if weight.grad is not None)]


LLAMA = {"norm_placement": "pre", "qk_norm": "none"}


@pytest.mark.parametrize(
    ("changes", "recompute"),
    [
        ({}, "none"),
        *(
            pytest.param(changes, recompute, marks=pytest.mark.ci)
            for changes in ({}, LLAMA, {"norm_placement": "pre"}, {"num_experts": 6, "num_experts_per_token": 2})
            for recompute in ("none", "selective", "full")
        ),
    ],
)
def test_a_model_equals_torchs_and_compiles_once(fused: Kernels, changes: dict[str, Any], recompute: Recompute) -> None:
    """Pass by pass, over batches of three shapes; losses to 1e-6, gradients to 1e-5 of the largest."""
    by_pass = replace(fused, layers=None)
    ours, theirs = (model(kernels, recompute, **changes) for kernels in (by_pass, Kernels()))
    once = 0
    for batch, length in ((3, 11), (2, 24), (5, 7)):
        tokens = torch.randint(0, 59, (batch, length + 1), generator=torch.Generator().manual_seed(length))
        found, wanted = losses_and_gradients(ours, tokens), losses_and_gradients(theirs, tokens)
        assert abs(found[0] / wanted[0] - 1) < 1e-6
        for mine, exact in zip(found, wanted, strict=True):
            assert (mine - exact).abs().max() <= 1e-5 * exact.abs().max()
        once = once or compilations()
        assert compilations() == once, "compiled again for another batch"


@pytest.mark.ci
def test_inference_compiles_once(fused: Kernels) -> None:
    ours, theirs = (model(kernels, "none", **LLAMA).eval() for kernels in (fused, Kernels()))
    for mode in (torch.no_grad, torch.inference_mode):
        once = 0
        for batch, length in ((3, 11), (2, 24), (5, 7)):
            tokens = torch.randint(0, 59, (batch, length))
            with mode():
                torch.testing.assert_close(ours.logits(tokens), theirs.logits(tokens), rtol=1e-5, atol=1e-5)
            once = once or compilations()
            assert compilations() == once


def test_no_positions_are_no_reason_to_compile(fused: Kernels) -> None:
    before = compilations()
    leaf = torch.zeros(0, 8, requires_grad=True)
    assert fused.swiglu(leaf).shape == (0, 4) and fused.rms_norm(leaf, torch.ones(8), EPSILON).shape == (0, 8)
    assert compilations() == before


@pytest.fixture
def nothing_said() -> Iterator[None]:
    choice._say_once.cache_clear()
    yield
    choice._say_once.cache_clear()


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("lacks", ["Triton", "C compiler", "Python.h"])
def test_a_machine_that_cannot_compile(
    lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`compile` says what is missing; `auto` on CUDA takes torch's operators, and says so once."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None if lacks == "Triton" else object())
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None if lacks == "C compiler" else "/usr/bin/cc")
    if lacks == "Python.h":
        monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(ConfigError, match=rf"training.kernels: compile, but .*{lacks}.*write auto, or torch"):
        choose_kernels("compile", device)
    kernels = [choose_kernels("auto", device) for _ in "ab"]
    assert all(own.name == "torch" and own.swiglu is Kernels().swiglu for own in kernels)
    assert [lacks in record.message for record in caplog.records] == [True]


def test_without_a_cpp_compiler_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match=r"compile, but there is no C\+\+ compiler; write auto"):
        choose_kernels("compile", CPU)

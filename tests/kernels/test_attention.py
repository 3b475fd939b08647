"""Causal attention with shared heads, windows and documents: torch's form, compiled loops, FlexAttention's forward and mask.

FlexAttention has no backward on a CPU: on CUDA tools/gpu_check.py compares its gradients.
"""

import gc
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from overtok_megatron.kernels import flex_attention, reference
from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.kernels.documents import Documents

CPU = torch.device("cpu")
BLOCK = 128


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def packed(batch: int, length: int, mean: int) -> Tensor:
    """Document ids [batch, length]: documents of about `mean` positions, the last sequence a single one."""
    ends = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 1 / mean
    ends[-1] = False
    return ends.long().cumsum(1)


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None, ids: Tensor | None) -> Tensor:
    """Softmax over the visible positions, from repeated keys and values."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible(q.shape[0], q.shape[2], window, ids).unsqueeze(1), -torch.inf).softmax(-1) @ v


def visible(batch: int, length: int, window: int | None, ids: Tensor | None) -> Tensor:
    """[batch, length, length] bool: queries, keys."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    seen = (distance >= 0) & (distance < (length if window is None else window))
    return seen.expand(batch, -1, -1) if ids is None else seen & (ids.unsqueeze(2) == ids.unsqueeze(1))


def kernels_of(name: str) -> Kernels:
    kernels = choose_kernels(name, CPU)
    assert kernels.name == ("cpu" if name == "auto" else "torch")
    return kernels


@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 1, 37, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length"), [(4, 4, 65), (4, 2, 1), (6, 2, 65), (4, 1, 300), (8, 2, 520), (6, 3, 257)]
)
def test_every_gradient(
    name: str, dtype: torch.dtype, documents: bool, window: int | None, heads: int, kv_heads: int, length: int
) -> None:
    inputs = [
        normal(2, length, count, 8, seed=count + place) for place, count in enumerate((heads, kv_heads, kv_heads))
    ]
    ids = packed(2, length, 20) if documents else None
    grad = normal(2, heads, length, 8, seed=9).to(dtype)

    def run(kind: torch.dtype, exact: bool) -> list[Tensor]:
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in inputs]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        if exact:
            out = by_definition(q, k, v, window, ids)
        else:
            out = kernels_of(name).causal_attention(q, k, v, window, None if ids is None else Documents(ids))
        return [out, *torch.autograd.grad(out, leaves, grad.to(kind))]

    # relative to the norm of the float64 result; bfloat16 keeps 8 bits, and scores and probabilities are rounded as well
    tolerance = 2e-6 if dtype == torch.float32 else 1.2e-2
    for ours, wanted in zip(run(dtype, exact=False), run(torch.float64, exact=True), strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        # A window of 1 gives q and k the gradient 0, where only rounding is left, of the size of the incoming gradient's.
        scale = wanted.norm() if window != 1 and length > 1 else grad.double().norm()
        assert (ours.double() - wanted).norm() <= tolerance * scale


def largest_tensor(run: Any) -> int:
    """The most elements that a tensor made while `run` runs has, from torch's operators that show as calls."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
            return out

    with Largest() as mode:
        run()
    return mode.elements


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_shared_heads_are_not_repeated(name: str) -> None:
    """Sixteen query heads of one key/value head, and values and keys that are much longer than the queries' tile."""
    q, k, v = (torch.randn(1, heads, 512, 8) for heads in (16, 1, 1))
    repeated: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[:3] == (1, 16, 512) and out.data_ptr() != q.data_ptr():
                repeated.append(out)
            return out

    with Watch():
        out = kernels_of(name).causal_attention(q, k, v, None, None)
    others = [x for x in repeated if not torch.equal(x, out) and not torch.equal(x, q * 8**-0.5)]
    assert not others, [x.shape for x in others]


MASKS = [
    (1, None, 9), (1, 1, None), (37, 5, 9), (128, 128, None), (128, None, 50), (129, 64, None), (200, 70, 30), (300, 1, None),
    (300, 150, None), (300, 257, 100), (513, 300, None), (640, 129, 200), (1000, None, 300), (1024, 256, None),
]  # fmt: skip


def block_mask(batch: int, length: int, window: int | None, ids: Tensor | None) -> BlockMask:
    if ids is not None:
        return flex_attention.document_block_mask(ids, window)
    assert window is not None
    return flex_attention.window_block_mask(batch, length, window, CPU)


@pytest.mark.parametrize(("length", "window", "mean"), MASKS)
def test_a_block_mask_is_the_mask_of_all_pairs(length: int, window: int | None, mean: int | None) -> None:
    ids = None if mean is None else packed(3, length, mean)
    ours = block_mask(3, length, window, ids)
    dense = visible(3, length, window, ids)
    b, q, k = torch.meshgrid(torch.arange(3), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(ours.mask_mod(b, torch.zeros_like(b), q, k), dense)

    theirs = create_block_mask(
        lambda b, h, q, k: dense[b, q, k], 3, None, length, length, device="cpu", BLOCK_SIZE=BLOCK
    )
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "q", "full_kv", "full_q"):
        counts = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks")), kind
        listed = torch.arange(counts.shape[-1]) < counts.unsqueeze(-1)  # what comes after them means nothing
        indices = (getattr(mask, f"{kind}_indices").masked_fill(~listed, -1) for mask in (ours, theirs))
        assert torch.equal(*indices), kind


def test_a_window_costs_the_same_per_token_at_any_length() -> None:
    visited = []
    for length in (2048, 4096, 8192):
        mask = flex_attention.window_block_mask(1, length, 512, CPU)
        assert mask.full_kv_num_blocks is not None
        visited.append(int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) / (length // BLOCK))
        assert (
            int(mask.kv_num_blocks.max()) == 2
        )  # the diagonal and the window's edge; the mask of pairs is read there only
    assert visited == sorted(visited) and visited[-1] < 5 == 512 // BLOCK + 1


def test_a_mask_is_made_without_waiting_and_without_all_pairs() -> None:
    length = 4096
    waits: list[str] = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
                waits.append(str(function))
            return function(*args, **(kwargs or {}))

    ids = packed(2, length, 500)
    flex_attention.window_block_mask.cache_clear()
    with Waits():
        elements = largest_tensor(
            lambda: (
                flex_attention.document_block_mask(ids, None),
                flex_attention.document_block_mask(ids, 300),
                flex_attention.window_block_mask(2, length, 300, CPU),
            )
        )
    assert not waits
    assert elements <= 2 * max(length, (length // BLOCK) * (length // BLOCK + 1))
    assert largest_tensor(lambda: reference.document_mask(ids, None, torch.float32)) >= 2 * length**2


def test_masks_are_kept() -> None:
    made = flex_attention.window_block_mask(2, 300, 7, CPU)
    assert flex_attention.window_block_mask(2, 300, 7, CPU) is made
    documents = Documents(packed(2, 300, 30))
    assert documents.derive(flex_attention.document_block_mask, 7) is documents.derive(
        flex_attention.document_block_mask, 7
    )
    assert documents.derive(flex_attention.document_block_mask, None).kv_num_blocks.shape == (2, 1, 3)


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    """One compiled function for all tests here, and no trace of it afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    flex_attention._compiled.cache_clear()
    gc.collect()


def check_forward(
    batch: int, length: int, window: int | None, mean: int | None, dtype: torch.dtype, heads: int
) -> None:
    q, k, v = (normal(batch, length, count, 16, seed=count).to(dtype).transpose(1, 2) for count in (heads, 2, 2))
    v = v.flip(2)  # no two of them may be one tensor
    ids = None if mean is None else packed(batch, length, mean)
    with torch.no_grad():
        out = flex_attention.masked_attention(q, k, v, block_mask(batch, length, window, ids))
    wanted = by_definition(q.double(), k.double(), v.double(), window, ids)
    assert out.dtype == dtype
    assert (out.double() - wanted).norm() <= (2e-6 if dtype == torch.float32 else 1e-2) * wanted.norm()


@pytest.mark.usefixtures("compiled")
def test_flex_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths one after the other: the first is compiled for, the second compiles for any, and no further one compiles.

    Where torch may compile no more, it raises: its eager form would keep all scores.
    """
    counters = torch._dynamo.utils.counters
    counters.clear()
    for length, window, mean in ((300, 70, None), (200, None, 30), (513, 70, 30), (257, 1, None), (1000, None, 300)):
        check_forward(2, length, window, mean, torch.float32, 4)
    assert counters["stats"]["unique_graphs"] == 2
    monkeypatch.setattr(flex_attention, "_MOST_ENTRIES", 2)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        check_forward(1, 300, 70, None, torch.bfloat16, 4)


@pytest.mark.ci
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 6])
def test_flex_forward_of_more_shapes(dtype: torch.dtype, heads: int) -> None:
    """One batch size: for a second one, Inductor's C++ of torch 2.13 does not compile. On CUDA it makes Triton."""
    for length, window, mean in MASKS:
        check_forward(1, length, window, mean, dtype, heads)


def test_flex_never_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the dense masks serve, gradients and all; a device that is not CUDA never reaches FlexAttention."""
    monkeypatch.setattr(flex_attention, "masked_attention", lambda *arguments: pytest.fail("FlexAttention on a CPU"))
    q, k, v = (normal(2, heads, 40, 16, seed=heads).float().requires_grad_() for heads in (4, 2, 2))
    documents = Documents(packed(2, 40, 9))
    for window, within in ((None, None), (7, None), (None, documents), (7, documents)):
        ours = flex_attention.causal_attention(q, k, v, window, within)
        assert torch.equal(ours, reference.causal_attention(q, k, v, window, within))
        assert ours.requires_grad


def test_the_choice_on_cuda(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 0)
    assert choose_kernels("torch", device).causal_attention is reference.causal_attention
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_kernels("auto", device).causal_attention is flex_attention.causal_attention
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_kernels("auto", device).causal_attention is reference.causal_attention
    assert "dense masks" in caplog.text

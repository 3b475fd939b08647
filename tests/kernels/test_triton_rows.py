"""The Triton kernels without a GPU: interpreted they do what torch does, all of them compile for NVIDIA's Ampere and Hopper
without spilling a register, and no number that differs from step to step makes Triton compile again."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from gpu_checks import row_checks
from kernel_resources import CAPABILITIES, Case, cases, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from overtok_megatron.kernels import triton_hash, triton_rows, triton_sums
from overtok_megatron.kernels.rows import HashTables, RowGradientSums, RowStep, StoredRows
from overtok_megatron.kernels.triton_rows import TritonRowKernels


def check_interpreted(*checks: Callable[..., None], seconds: float = 200) -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(row_checks.__file__), *(check.__name__ for check in checks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not know this NumPy (3.6 with NumPy 2.4)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [check.__name__ for check in checks]


def test_interpreted_kernels_do_what_torch_does() -> None:
    check_interpreted(*(check for check in row_checks.CHECKS if check is not row_checks.check_frequent_rows))


def test_interpreted_sums_of_frequent_rows() -> None:
    check_interpreted(row_checks.check_few_frequent_rows)


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_interpreted_sums_of_frequent_rows_of_all_widths() -> None:
    check_interpreted(row_checks.check_frequent_rows, seconds=900)


def test_the_checks_know_where_rows_are_cut() -> None:
    assert row_checks.SHORT == triton_sums.SEGMENT


def check_compiled(case: Case, capability: int) -> None:
    compiled = resources(case, capability)
    assert "atom" not in compiled.ptx  # the order of every sum is fixed
    assert compiled.spilled == 0, compiled
    assert 0 < compiled.registers <= 255
    if "gather" in case.name or "add fp32" in case.name or "add bf16" in case.name:  # rows move in pieces of 16 bytes
        assert case.constants["WIDTH"] % 16 or {"ld.global.v4.b32", "st.global.v4.b32"} <= set(compiled.ptx.split())


@pytest.mark.parametrize("case", cases([64]), ids=lambda case: case.name)
def test_kernels_compile_for_hopper(case: Case) -> None:
    check_compiled(case, 90)


@pytest.mark.ci
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", cases([24, 64, 100, 128, 256, 512, 1024, 2048]), ids=lambda case: case.name)
def test_kernels_compile_for_cards_and_widths(case: Case, capability: int) -> None:
    check_compiled(case, capability)


@pytest.fixture
def specializations(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By kernel, what Triton would compile for an H100; a launch only notes it, so that no device is needed."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: dict[str, set[str]] = defaultdict(set)
    kernels = (
        triton_hash.ngram_row_ids_kernel,
        triton_rows.gather_kernel,
        triton_rows.update_kernel,
        triton_sums.add_kernel,
        triton_sums.add_segments_kernel,
    )
    for kernel in kernels:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def run(
            *args: Any, grid: Any, warmup: bool, bind: Any = bind, name: str = kernel.__name__, **named: Any
        ) -> None:
            _, specialization, options = bind(*args, **named)
            found[name].add(str((specialization, options)))

        monkeypatch.setattr(kernel, "run", run)
    return found


@pytest.mark.parametrize("width", [7, 64])
def test_no_step_compiles_another_kernel(specializations: dict[str, set[str]], width: int) -> None:
    """Counts that are 1 or a multiple of 16, numbers that happen to be integers, and parts of larger tensors."""
    kernels, rows = TritonRowKernels(), 2048
    table = StoredRows(
        torch.zeros(rows, width, dtype=torch.bfloat16), None, 2**33, torch.zeros(rows, dtype=torch.uint8)
    )
    state = {"square_sum": torch.zeros(rows)}
    hashed = HashTables(orders=(2, 3), sizes=(97, 101), base=50, pad_id=0, reset=True, eod_id=3, stripes=11)
    for step, count in enumerate((0, 1, 15, 16, 17, 160, 1024, 1025)):
        first = step % 3  # the address of a part is often no multiple of 16
        index = torch.arange(rows)[first : first + count]
        grad = torch.zeros(rows, width)[first : first + count]
        kernels.ngram_row_ids(torch.zeros(2, 2 + count, dtype=torch.int64), hashed)
        kernels.gather(table, index, index, torch.bfloat16)
        for fresh in (True, False):
            kernels.add(RowGradientSums.empty(count, width, grad.device), index << 32 | index, grad, fresh=fresh)
        rate = (0.1, 1, 0)[step % 3]
        numbers = RowStep(
            rule="rowwise_adagrad", rate=rate, decay=1, betas=(0, 1), eps=1e-8, grad_factor=rate, noise=step * 2**29
        )
        kernels.update(table, state, index, grad, numbers)
    compiled = {name: len(found) for name, found in specializations.items()}
    assert compiled == {
        "ngram_row_ids_kernel": 1,
        "gather_kernel": 1,
        "update_kernel": 1,
        "add_kernel": 2,  # fresh or not
        "add_segments_kernel": 2,
    }

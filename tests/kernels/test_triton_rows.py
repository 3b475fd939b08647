"""The Triton kernels without a GPU: interpreted they do what torch does, and all of them compile for NVIDIA's Hopper."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from row_checks import CHECKS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from overtok_megatron.kernels import triton_rows as rows

WIDTH = {"WIDTH": 64, "ROWS": 32, "COLUMNS": 64}
UPDATE = dict.fromkeys(["rate", "decay", "beta1", "beta2", "eps", "factor"], "fp32") | {
    "index": "*i64", "grad": "*fp32", "flags": "*u8", "count": "i32", "key": "i32", "first": "i64",
}  # fmt: skip
HASH = dict.fromkeys(
    ["positions", "length", "base", "pad_id", "eod_id", "stripes", "total", "smallest"], "i32"
) | dict.fromkeys(["extended", "numbers", "out"], "*i64")
CASES: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (rows.ngram_rows_kernel, HASH, {"TABLES": 4, "LONGEST": 3, "RESET": True, "BLOCK": 256}),
    *(
        (
            rows.add_kernel,
            {"grad": grad, "order": "*i64", "ends": "*i64", "total": "*fp32", "squares": "*fp32"},
            {"FRESH": fresh, "WIDTH": 64, "COLUMNS": 64},
        )
        for grad, fresh in (("*fp32", True), ("*bf16", False))
    ),
    *(
        (
            rows.gather_kernel,
            {"weight": stored, "slots": "*i64", "out": "*bf16", "count": "i32"} | more,
            {"INDEXED": "index" in more, "SCALED": "scale" in more, **WIDTH}
            | {name: None for name in ("index", "scale") if name not in more},
        )
        for stored, more in (("*fp32", {}), ("*bf16", {"index": "*i64"}), ("*i8", {"scale": "*fp32"}))
    ),
    *(
        (
            rows.update_kernel,
            UPDATE | {"weight": stored, **states} | ({"scale": "*fp32"} if stored == "*i8" else {}),
            {"RULE": rule, "SCALED": stored == "*i8", "FLAGGED": True, **WIDTH}
            | {name: None for name in ("first_state", "second_state") if name not in states}
            | ({} if stored == "*i8" else {"scale": None}),
        )
        for stored in ("*fp32", "*bf16", "*i8")
        for rule, states in (
            ("rowwise_adagrad", {"first_state": "*bf16"}),
            ("rowwise_adam", {"first_state": "*bf16", "second_state": "*fp32"}),
            ("adam", {"first_state": "*fp32", "second_state": "*bf16"}),
            ("sgd", {}),
        )
    ),
]


def test_interpreted_kernels_do_what_torch_does() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("row_checks.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not know this NumPy (3.6 with NumPy 2.4)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_kernels_compile_for_hopper(case: tuple[Any, dict[str, str], dict[str, Any]]) -> None:
    kernel, types, constants = case
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "atom" not in compiled.asm["ptx"]  # the order of every sum is fixed
    assert len(compiled.asm["cubin"]) > 0

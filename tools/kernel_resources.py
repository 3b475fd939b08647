"""Registers, spilled bytes and shared memory of every Triton kernel, compiled for cards that need not be here.

One line per case: what the code that Triton generates for an A100 (sm_80) and an H100 (sm_90) needs. A kernel that spills
keeps values of its threads in device memory, and is slow without any error. Exit code: 1 where a kernel spills.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import PTXASError

from overtok_megatron.commands.arguments import positive
from overtok_megatron.kernels.triton_hash import ngram_row_ids_kernel
from overtok_megatron.kernels.triton_rows import gather_kernel, gather_tiles, update_kernel, update_tiles
from overtok_megatron.kernels.triton_sums import add_kernel, add_segments_kernel, add_segments_shape, add_shape

CAPABILITIES = (80, 90)
WIDTHS = (64, 512)
_FORMATS = ("*fp32", "*bf16", "*i8")
_STATES = {
    "rowwise_adagrad": {"first_state": "*bf16"},
    "rowwise_adam": {"first_state": "*bf16", "second_state": "*fp32"},
    "adam": {"first_state": "*fp32", "second_state": "*bf16"},
    "sgd": {},
}


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments and its compile-time constants, as the row kernels launch it."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


@dataclass(frozen=True)
class Resources:
    """Of one compiled case. spilled: bytes per thread that lie in memory; shared: bytes per block."""

    name: str
    capability: int
    registers: int
    spilled: int
    shared: int
    ptx: str


def cases(widths: Sequence[int] = WIDTHS) -> Iterator[Case]:
    """The kernels of look-ups, sums and updates, for each format of rows and each rule, at some row widths; and the hashing."""
    numbers = ("positions", "length", "base", "pad_id", "eod_id", "stripes", "total", "smallest")
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("extended", "numbers", "out"), "*i64")
    constants: dict[str, Any] = {"TABLES": 4, "LONGEST": 3, "RESET": True, "BLOCK": 256}
    yield Case("ngram_row_ids", ngram_row_ids_kernel, types, constants)
    for width in widths:
        yield from _sums(width)
        for stored, more in zip(_FORMATS, ({}, {"index": "*i64"}, {"scale": "*fp32"}), strict=True):
            types = {"weight": stored, "slots": "*i64", "out": "*bf16", "count": "i32"} | more
            constants = {"INDEXED": "index" in more, "SCALED": "scale" in more, **gather_tiles(width)}
            yield Case(f"gather {stored[1:]} w {width}", gather_kernel, types, constants)
        for stored in _FORMATS:
            for rule, states in _STATES.items():
                types = dict.fromkeys(("rate", "decay", "beta1", "beta2", "eps", "factor"), "fp32") | {
                    "index": "*i64", "grad": "*fp32", "flags": "*u8", "count": "i32", "key": "i32", "first_row_id": "i64",
                    "weight": stored, **states, **({"scale": "*fp32"} if stored == "*i8" else {}),
                }  # fmt: skip
                constants = {"RULE": rule, "SCALED": stored == "*i8", "FLAGGED": True, **update_tiles(width)}
                yield Case(f"update {rule} {stored[1:]} w {width}", update_kernel, types, constants)


def _sums(width: int) -> Iterator[Case]:
    types = {"sorted_lookups": "*i64", "ends": "*i64", "total": "*fp32", "squares": "*fp32", "segments": "*fp32"}
    types |= dict.fromkeys(("lookups", "rows", "places"), "i32")
    sizes, warps = add_shape(width)
    for grad, fresh in (("*fp32", True), ("*bf16", False)):
        name = f"add {grad[1:]} w {width}"
        yield Case(name, add_kernel, types | {"grad": grad}, {"FRESH": fresh, **sizes}, warps)
    del types["rows"], types["places"]
    sizes, warps = add_segments_shape(width)
    yield Case(f"add segments w {width}", add_segments_kernel, types, {"FRESH": False, **sizes}, warps)


def resources(case: Case, capability: int) -> Resources:
    """Compile a case for NVIDIA cards of a capability (80 is 8.0); no card is needed."""
    names = case.kernel.arg_names
    given = {**case.types, **{name: "constexpr" for name in names if name not in case.types}}
    absent = {name: None for name in names if name not in case.types and name not in case.constants}
    signature = {name: given[name] for name in names}
    # as for tensors that torch has allocated; without this, Triton would make no load of 16 bytes
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if given[name][0] == "*" and not case.kernel.params[number].do_not_specialize_on_alignment
    }
    source = ASTSource(case.kernel, signature, constexprs={**case.constants, **absent}, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.warps})
    usage = dict(re.findall(r"(\w+):(\d+)", _usage(compiled.asm["cubin"])))
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    return Resources(case.name, capability, int(usage["REG"]), stack, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(binary: bytes) -> str:
    """What the tool that Triton ships reads from a compiled kernel: REG, STACK (where spills go), LOCAL, SHARED."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(binary)
        command = [str(tool), "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=positive, nargs="+", default=list(WIDTHS), help="values per row")
    parser.add_argument(
        "--capabilities",
        type=positive,
        nargs="+",
        default=list(CAPABILITIES),
        help="compute capabilities without the dot, as 80 for 8.0",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK | os.X_OK):
        parser.error(f"--json: {options.json}: cannot be written; name a file in a folder where this user can write")
    print(f"{'kernel':34} {'sm':>4} {'registers':>9} {'spilled':>8} {'shared':>7}")
    found = []
    for case in cases(options.widths):
        for capability in options.capabilities:
            try:
                with redirect_stdout(io.StringIO()):  # Triton prints the whole program that it could not assemble
                    one = resources(case, capability)
            except PTXASError:
                parser.error(
                    f"--capabilities: {capability}: Triton's assembler does not know it; write 80 for 8.0, 90 for 9.0"
                )
            found.append(one)
            print(f"{one.name:34} {capability:4} {one.registers:9} {one.spilled:8} {one.shared:7}", flush=True)
    if options.json is not None:
        records = [{key: value for key, value in asdict(one).items() if key != "ptx"} for one in found]
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 1 if any(one.spilled for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())

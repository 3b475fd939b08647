"""Every form of the row kernels knows every update rule of the configuration, and refuses any other.

What the forms compute is compared for every rule in `gpu_checks.row_checks`, which runs on the compiled loops, on Triton's
interpreter and on a GPU.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from gpu_checks.row_checks import row_step, stored

from overtok_megatron.config.counts import ROW_STATES
from overtok_megatron.config.schema import OverEncodingConfig, RowRule
from overtok_megatron.kernels import cpu_rows
from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.rows import RowKernels

RULES = get_args(RowRule)
FORGOTTEN = cast(Any, "forgotten")
SOURCE = Path(cpu_rows.__file__).with_name("row_optimizers.cpp")


def test_every_rule_of_the_schema_has_a_state_and_a_number() -> None:
    assert OverEncodingConfig.model_fields["optimizer"].annotation == RowRule
    assert set(ROW_STATES) == set(RULES)
    assert set(cpu_rows.RULE_NUMBERS) == set(RULES)


def test_numbers_of_rules_are_those_of_the_loops() -> None:
    enum = re.search(r"enum Rule \{([^}=]*)\};", SOURCE.read_text(encoding="utf-8"))
    assert enum is not None
    names = [name.strip() for name in enum[1].split(",")]
    assert {name: number for number, name in enumerate(names)} == cpu_rows.RULE_NUMBERS


@pytest.mark.parametrize("is_compiled", [False, True])
def test_an_unknown_rule_is_refused_and_changes_nothing(is_compiled: bool) -> None:
    kernels = RowKernels()
    if is_compiled:
        library = load_library()
        if library is None:
            pytest.skip("no C++ compiler")
        kernels = cpu_rows.CpuRowKernels(library)
    rows = stored(torch.ones(6, 4), torch.float32)
    state = {"exp_avg": torch.zeros(6, 4), "exp_avg_sq": torch.zeros(6, 4)}
    step = replace(row_step("adam"), rule=FORGOTTEN)
    with pytest.raises(AssertionError, match="forgotten"):
        kernels.update(rows, state, torch.arange(3), torch.ones(3, 4), step)
    assert torch.equal(rows.weight, torch.ones(6, 4))
    assert not state["exp_avg"].any()


def test_triton_compiles_every_rule_and_refuses_an_unknown_one() -> None:
    triton = pytest.importorskip("triton")
    from kernel_resources import cases, resources

    updates = {case.constants["RULE"]: case for case in cases([64]) if "RULE" in case.constants}
    assert set(updates) == set(RULES)
    unknown = replace(updates["adam"], constants=updates["adam"].constants | {"RULE": FORGOTTEN})
    with pytest.raises(triton.CompilationError, match="a rule that this kernel does not know"):
        resources(unknown, 90)

"""One flipped bit in one rank's weights is found before the next save, and the rank is named with its host."""

import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import WeightsError
from overtok_megatron.parallel.splits import splits_of
from overtok_megatron.training import weights_check
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.weights_check import WeightsCheck, checksum
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, layout, layout_config, own_tokens, stream
from support.trained_runs import TrainedRuns, tiny_run_config

HOST = socket.gethostname()


def flip(values: Tensor, index: int, bit: int) -> None:
    """Flip a bit of one value, in place."""
    words = values.detach().reshape(-1).view({2: torch.int16, 4: torch.int32}[values.element_size()])
    assert words.data_ptr() == values.data_ptr()
    size = 8 * values.element_size()
    words[index] ^= (1 << bit) - (1 << size if bit == size - 1 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_is_its_formula_and_sees_every_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_check, "_CHUNK", 8)
    values = torch.randn(21, generator=torch.Generator().manual_seed(3)).to(dtype)
    words = values.view({2: torch.int16, 4: torch.int32}[values.element_size()]).tolist()
    factor, next_chunk, total = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0
    for begin in range(0, 21, 8):
        total = total * next_chunk + sum(word * (i * factor | 1) for i, word in enumerate(words[begin : begin + 8]))
    whole = int(checksum(values))
    assert whole % 2**64 == total % 2**64
    seen = {whole}
    for index in range(21):
        for bit in range(8 * values.element_size()):
            other = values.clone()
            flip(other, index, bit)
            seen.add(int(checksum(other)))
    assert len(seen) == 1 + 21 * 8 * values.element_size()
    assert int(checksum(values.flip(0))) != whole
    assert int(checksum(values[:0])) == 0


def found_flips(short: str, half: bool, whole_alone: bool) -> list[str]:
    """One rank's work: what the check says after a step, and after a further one with a flipped bit on the last rank.

    whole_alone: the bit is one of a weight that is not split.
    """
    config = layout_config(layout(short, training={"precision": "bf16" if half else "fp32"}))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    check, said = WeightsCheck(engine, 1), []
    for step in (1, 2):
        engine.step(own_tokens(engine, stream()[step]), 3e-3)
        parameters = [one for one in engine.model.parameters() if bool(splits_of(one)) != whole_alone]
        chosen = parameters if engine.grid.shape.tensor > 1 else list(engine.model.parameters())
        if step == 2 and engine.grid.rank == engine.grid.shape.world_size - 1:
            flip(chosen[0], random.Random(1).randrange(chosen[0].numel()), 3)
        try:
            assert check.due(step, saved=False)
            check.run(step)
            said.append("")
        except WeightsError as error:
            said.append(str(error))
    return said


def all_flips(cases: list[tuple[str, bool, bool]]) -> list[list[str]]:
    return [found_flips(*case) for case in cases]


def test_two_replicas_are_both_named() -> None:
    cases = [("", False, True), ("z1", True, True), ("z2", False, True), ("tp2", False, True), ("tp2", False, False)]
    ranks = run_ranks(2, all_flips, cases)
    assert ranks[0] == ranks[1]
    *both, split = ranks[0]
    for fine, said in both:
        assert fine == ""
        assert f"is not the same on rank 0 ({HOST}) and rank 1 ({HOST}), which should hold the same weights" in said
        assert said.startswith("after step 2 ") and "\n" not in said
    assert split == ["", ""]  # nobody else has that part


def test_of_three_replicas_the_odd_one_is_named() -> None:
    ranks = run_ranks(3, all_flips, [("", False, True)])
    assert ranks[0] == ranks[1] == ranks[2]
    assert f"on rank 2 ({HOST}) is not what the 2 other ranks hold" in ranks[0][0][1]


def a_run(folder: Path, scratch: Path) -> str:
    """One rank's work: a run that saves every second step, with a bit flipped in the fourth; what ended it."""
    from overtok_megatron.training.trainer import Trainer

    values = tiny_run_config(folder, "bf16").model_dump(mode="json")
    values["training"] |= {"output_directory": str(scratch), "micro_batch_size": 4, "train_iters": 8}
    values["training"]["weights_check_interval"] = 100
    values["checkpoint"]["interval"] = 2
    run, count = Trainer(RunConfig.model_validate(values), device=CPU, num_threads=1), [0]
    step = run.engine.step

    def flipping(*arguments: Any, **others: Any) -> Any:
        result = step(*arguments, **others)
        count[0] += 1
        if count[0] == 4 and run.grid.rank == 1:
            flip(next(iter(run.engine.model.parameters())), 5, 14)
        return result

    run.engine.step = flipping  # type: ignore[method-assign]
    with pytest.raises(WeightsError) as caught:
        run.run()
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_a_run_stops_before_it_saves_what_differs(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    for said in run_ranks(2, a_run, trained_runs.folder, tmp_path):
        assert "after step 4 embedding" in said
        assert "nothing of it is saved, start again from the last checkpoint" in said
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None
    assert latest.name == "step_00000002"


def off() -> list[bool]:
    """One rank's work."""
    found = []
    for short in ("z3", ""):
        config = layout_config(layout(short))
        check = WeightsCheck(TrainingEngine(config, start_processes(config, CPU), CPU, EOD), 1)
        found.append(check.due(1, saved=True))
    return found


def test_it_is_off_where_nobody_has_a_copy() -> None:
    assert run_ranks(2, off) == [[False, True]] * 2

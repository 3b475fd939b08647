"""Before a save its bytes are counted, on every layout, and compared with what is free: none is begun that cannot fit."""

import socket
from pathlib import Path

import pytest

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.errors import CheckpointError
from overtok_megatron.training import save_space
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.save_space import bytes_to_write, free_bytes
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, Layout, layout, layout_config, own_tokens, stream

HOST = socket.gethostname()
HALF = {"precision": "bf16"}
# Tables of 0.8 MB and 0.5 MB of dense weights, beside which names and metadata are small.
WIDE = {"model": {"hidden_size": 96, "intermediate_size": 192}, "over": {"table_rows": 997, "optimizer": "adam"}}
CASES = {
    "float32, no ZeRO": layout("", **WIDE),
    "bfloat16, ZeRO 1": layout("z1", training=HALF, **WIDE),
    "bfloat16, ZeRO 3": layout("z3", training=HALF, **WIDE),
    "pipeline": layout("pp2 z1", training=HALF, **WIDE),
}
MORE = {
    "bfloat16, no ZeRO": layout("", training=HALF, **WIDE),
    "float32, ZeRO 2, offload": layout("z2 offload", **WIDE),
    "tensor": layout("tp2", **WIDE),
}


def save_all(cases: dict[str, Layout], folder: Path) -> dict[str, int]:
    """One rank's work: of each layout the bytes that it says it will write."""
    found = {}
    for name, case in cases.items():
        config = layout_config(case)
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        engine.step(own_tokens(engine, stream()[0]), 1e-3)
        saver = Saver(engine, CheckpointStore(folder / name), eod_id=EOD, tokenizer_fingerprint="none")
        found[name] = bytes_to_write(engine, saver._writer)
        saver.save(1, 0)
        saver.finish()
    return found


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_bytes_are_counted(tmp_path: Path, cases: dict[str, Layout]) -> None:
    ranks = run_ranks(2, save_all, cases, tmp_path)
    for name in cases:
        told = sum(rank[name] for rank in ranks)
        written = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert 0.85 * written < told <= written, (name, told, written)


def save_on_a_full_disk(folder: Path) -> tuple[str, list[str], str]:
    """One rank's work: what a save says where the second rank's host sees a full disk, what is left, and what comes then."""
    config = layout_config(layout("z1"))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    store = CheckpointStore(folder)
    saver = Saver(engine, store, eod_id=EOD, tokenizer_fingerprint="none")
    engine.step(own_tokens(engine, stream()[0]), 1e-3)
    saver.save(1, 12)
    saver.finish()
    if engine.grid.rank == 1:
        save_space.free_bytes = lambda _: 1000
    with pytest.raises(CheckpointError) as caught:
        saver.save(2, 24)
    left = sorted(path.name for path in store.root.iterdir())
    save_space.free_bytes = lambda _: None  # a file system that does not tell is not asked
    saver.save(3, 36)
    saver.finish()
    latest = store.latest()
    assert latest is not None
    return str(caught.value), left, latest.name


def test_a_save_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    for error, left, latest in run_ranks(2, save_on_a_full_disk, tmp_path):
        assert error.startswith(f"could not save step 2: {tmp_path}/checkpoints: 0.00")
        assert (
            f"GB are to be written and 0.000 GB are free on {HOST} (rank 1); earlier checkpoints are intact: make room"
            in error
        )
        assert left == ["latest", "step_00000001"]
        assert latest == "step_00000003"


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.01)

"""The benchmark of tables leaves out what does not fit, and says so; its estimates are not below what is really taken."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import table_benchmark
import torch
from memory_budget import Budget, held
from table_benchmark import tables
from table_contenders import Needs

from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.tokenizers.loading import load_tokenizer

CPU = torch.device("cpu")
LOOK_UPS = 512 * 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("some words and other words " * 400, encoding="utf-8")
    prepare([folder / "text.txt"], folder / "set", load_tokenizer("bytes", None))
    return str(folder / "set")


def options(data: str, memory: float | None) -> argparse.Namespace:
    return argparse.Namespace(
        data=data, tokens=LOOK_UPS // 4, rounds=1, widths=[64], powers=[15], memory=memory, dense_up_to=0, png=None, device=CPU
    )  # fmt: skip


def test_what_does_not_fit_is_left_out_and_named(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    need = Needs(4 * (2**15 - 7) + 12, 64, LOOK_UPS, LOOK_UPS)  # tables of 33 MB in float32
    room = need.ours(torch.float32) + need.ours(torch.bfloat16)
    spare = 2**25
    assert need.ours(torch.float32) + need.torch_tables(sparse=True) > room + 2 * spare
    assert (
        "SparseAdam" in tables(options(data, None))["cases"]["w 64, 2^15, text"]["seconds"]
    )  # nor does it fit by chance
    capsys.readouterr()
    cases = tables(options(data, (held(CPU) + room + spare) / 2**30))["cases"]
    said = capsys.readouterr().out
    for title in ("w 64, 2^15, text", "w 64, 2^15, uniform"):
        seconds, left_out = cases[title]["seconds"], cases[title]["left_out_bytes"]
        assert {"ours", "ours, bf16"} <= seconds.keys()
        assert left_out.keys() == {"SparseAdam"}
        assert not left_out.keys() & seconds.keys()
        assert f"{title}: " in said
    assert "SparseAdam left out: 0." in said
    assert "(--memory)" in said


def test_with_too_little_memory_nothing_runs(data: str) -> None:
    """From the command line, which starts the process again with the allocator's settings."""
    benchmark = [sys.executable, str(Path(table_benchmark.__file__).with_name("benchmark.py")), "--data", data]
    case = ["--rounds", "1", "--threads", "1", "tables", "--powers", "10", "--widths", "64", "--tokens", "512"]
    done = subprocess.run([*benchmark, *case, "--memory", "0.001"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ours, bf16 left out: 0.00 GiB beside ") == 2
    assert '"cases": {}' in done.stdout


def test_promises_count_before_their_pages_are_touched() -> None:
    budget = Budget((held(CPU) + 2**28) / 2**30, CPU)
    budget.begin()
    tensor = torch.zeros(2**26 * 3, dtype=torch.uint8)  # 192 MiB that no figure of the system shows yet
    assert budget.take("first", tensor.numel())
    assert not budget.take("second", tensor.numel())
    assert list(budget.left_out) == ["second"]
    budget.give_back(tensor.numel())
    assert budget.take("third", tensor.numel() // 2)


_MEASURE = """
import json, sys, torch, psutil
from pathlib import Path
from memory_budget import held
from table_contenders import Needs, limit, our_tables, torch_tables
from overtok_megatron.ngram.row_space import RowSpace
torch.set_num_threads(1)
size, width, tokens, cpu = 2**18, 64, 16384, torch.device("cpu")
space = RowSpace(ngram_order=3, num_slices=2, table_rows=size - 7, width=width)

def peak():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def grown(make):
    before = held(cpu)
    Path("/proc/self/clear_refs").write_text("5")
    for work in make():
        work(), work()
    return peak() - before

rows = torch.randint(0, size - 7, (tokens, 4))
need = Needs(space.total_rows, width, rows.numel(), rows.numel())
def ours():
    grad = torch.randn(tokens, 4, width)
    step, made = our_tables(rows, space, grad, torch.float32)
    return step, limit(made, rows, space, grad)
def sparse():
    return [torch_tables(rows, size, torch.randn(tokens, 4, width), sparse=True)]
def dense():
    return [torch_tables(rows, size, torch.randn(tokens, 4, width), sparse=False)]
sparse()[0]()  # what torch loads at first use is no part of a contender
print(json.dumps([
    [grown(ours), need.ours(torch.float32)],
    [grown(sparse), need.torch_tables(sparse=True)],
    [grown(dense), need.torch_tables(sparse=False)],
]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak that can be reset is a thing of Linux")
@pytest.mark.ci
def test_contenders_take_no_more_than_what_is_counted() -> None:
    script = f"import sys\nsys.path[:0] = {sys.path!r}\n{_MEASURE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for taken, counted in json.loads(done.stdout):
        assert 0.3 * counted < taken <= counted + 2**24, (taken, counted)

"""`tools/gpu_check.py` on the CPU: everything passes on one and on two processes, and what is wrong fails, by its name."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu_checks.listing import all_checks
from gpu_checks.registry import Check, Context, Outcome, Result
from gpu_checks.timing import Span, busy_seconds, device_seconds_of, device_spans, host_seconds_of
from gpu_checks.workers import Workers
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from overtok_megatron.kernels.build import load_library

TOOLS = Path(__file__).parent.parent.parent / "tools"
compiled = pytest.mark.skipif(load_library() is None, reason="no C++ compiler: both forms are torch's")


def run_tool(*arguments: str, script: Path = TOOLS / "gpu_check.py") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=230)


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(path.read_text(encoding="utf-8"))["checks"]}


def test_everything_passes_on_the_cpu(tmp_path: Path) -> None:
    done = run_tool("--quick", "--seconds", "220", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found = outcomes(tmp_path / "found.json")
    assert list(found) == [check.name for check in all_checks(1) if check.quick]
    statuses = {name: check["status"] for name, check in found.items()}
    skipped = [name for name, status in statuses.items() if status == "skipped"]
    assert skipped == ["saving thread's device", "waits for the device", "reads before the update"]
    assert set(statuses.values()) == {"passed", "measured", "skipped"}
    lines = done.stdout.splitlines()
    assert all(
        any(line.startswith(f"{name} ") and status in line for line in lines) for name, status in statuses.items()
    )
    assert lines[-1].endswith("measured, 3 skipped")
    head = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert head["versions"]["torch"] == torch.__version__
    assert head["device"].startswith("CPU")
    model = found["model: V 32 K, tables"]["numbers"]
    assert model["ratio"] > 0
    assert len(model["kernels"]) == 5
    assert model["tokens_per_step"] == 64
    assert " 64 tokens per step" in found["model: V 32 K, tables"]["figure"]
    passes = found["passes"]["numbers"]
    assert passes["choices"] == {"auto": "cpu" if load_library() else "torch", "compile": "compile", "torch": "torch"}
    assert set(passes["device_seconds"]) == set(passes["host_seconds"]) == set(passes["choices"].values())
    assert found["head: V 32 K"]["numbers"]["device_seconds"] > 0


def test_two_processes(tmp_path: Path) -> None:
    given = ["--processes", "2", "--quick", "--seconds", "220", "--json", str(tmp_path / "found.json")]
    done = run_tool(*given, "--only", "exchange", "layout: tensor", "layout: data, zero 2", "links")
    assert done.returncode == 0, done.stdout + done.stderr
    found = outcomes(tmp_path / "found.json")
    passed = [
        "exchange",
        "exchange: planned ahead",
        "layout: data, zero 2",
        "layout: tensor",
        "layout: tensor, sequence",
    ]
    assert [name for name, check in found.items() if check["status"] == "passed"] == passed
    assert found["links"]["numbers"]["all_to_all"] > 0


@pytest.mark.ci
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.timeout(900)
def test_the_long_form(processes: int) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--processes", str(processes), "--seconds", "850"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr


def planted(tmp_path: Path, text: str) -> Path:
    """A script that changes the package and calls the tool; its processes are spawned, so they are changed as well."""
    script = tmp_path / "planted.py"
    begin = f"import sys\nsys.path.insert(0, {str(TOOLS)!r})\nimport gpu_check\n"
    end = "\nif __name__ == '__main__':\n    sys.exit(gpu_check.main(sys.argv[1:]))\n"
    script.write_text(begin + textwrap.dedent(text) + end, encoding="utf-8")
    return script


@compiled
def test_a_wrong_row_fails(tmp_path: Path) -> None:
    script = planted(
        tmp_path,
        """
        from overtok_megatron.kernels.cpu_rows import CpuRowKernels
        right = CpuRowKernels._gathered

        def wrong(self, *arguments):
            rows = right(self, *arguments)
            rows[-1:] += 1
            return rows

        CpuRowKernels._gathered = wrong
        """,
    )
    given = ["--json", str(tmp_path / "found.json"), "--only", "rows: look-ups", "rows: hashing", "rows: large table"]
    done = run_tool(*given, script=script)
    assert done.returncode == 1, done.stdout + done.stderr
    found = outcomes(tmp_path / "found.json")
    assert found["rows: look-ups"]["status"] == found["rows: large table"]["status"] == "failed"
    assert "AssertionError" in found["rows: look-ups"]["figure"]
    assert "row_checks.py" in found["rows: look-ups"]["traceback"]
    assert found["rows: hashing"]["status"] == "passed"


@compiled
@pytest.mark.parametrize("name", ["head: V 32 K", pytest.param("training: sliding window", marks=pytest.mark.ci)])
def test_a_wrong_loss_fails(name: str, tmp_path: Path) -> None:
    script = planted(
        tmp_path,
        """
        from overtok_megatron.model.heads import OutputHead
        right = OutputHead.forward_losses

        def wrong(self, *arguments, **more):
            result = right(self, *arguments, **more)
            return result._replace(main_loss=result.main_loss * (1.0 if self.kernels.name == "torch" else 1.001))

        OutputHead.forward_losses = wrong
        """,
    )
    given = ["--json", str(tmp_path / "found.json"), "--only", name, "rows: hashing"]
    done = run_tool(*given, script=script)
    assert done.returncode == 1, done.stdout + done.stderr
    found = outcomes(tmp_path / "found.json")
    assert {name: check["status"] for name, check in found.items()} == {"rows: hashing": "passed", name: "failed"}
    assert done.stdout.splitlines()[-1] == "1 passed, 1 failed"


def raises(context: Context) -> Result:
    raise RuntimeError("first line\nsecond line")


def hangs(context: Context) -> Result:
    time.sleep(600)
    return Result(True, "awake")


def dies(context: Context) -> Result:
    print("last words", flush=True)
    os._exit(3)


def fine(context: Context) -> Result:
    return Result(True, f"process {os.getpid()}")


def outcome_of(workers: Workers, function: Any, seconds: float = 60.0) -> Outcome:
    return workers.run(Check(function.__name__, function, seconds))


def test_a_check_that_raises_hangs_or_dies_is_one_line(tmp_path: Path) -> None:
    workers = Workers(1, tmp_path, quick=True, cuda=False)
    try:
        first = outcome_of(workers, fine)
        raised = outcome_of(workers, raises)
        assert (raised.status, raised.figure) == ("failed", "RuntimeError: first line")
        assert "second line" in raised.traceback
        assert outcome_of(workers, fine).figure == first.figure  # it goes on in the same process
        hung = outcome_of(workers, hangs, seconds=0.3)
        assert (hung.status, hung.figure) == ("failed", "no result within its 0.3 s")
        died = outcome_of(workers, dies)
        assert (died.status, died.figure) == ("failed", "its process died (3)")
        assert died.traceback.endswith("last words\n")
    finally:
        workers.close()


def one_fails(context: Context) -> Result:
    """As in a collective: the other rank never comes back."""
    if context.rank == 1:
        raise ValueError("the cause")
    return hangs(context)


@pytest.mark.ci
def test_the_rank_that_fails_is_named_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    workers = Workers(2, tmp_path, quick=True, cuda=False)
    try:
        begin = time.monotonic()
        failed = outcome_of(workers, one_fails)
        assert (failed.status, failed.figure) == ("failed", "rank 1: ValueError: the cause")
        assert time.monotonic() - begin < 55
        assert outcome_of(workers, fine).status == "passed"
    finally:
        workers.close()


def test_wrong_calls_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (
        (["--json", str(tmp_path / "absent" / "found.json")], "found.json: cannot be written; name a file"),
        (["--json", str(tmp_path)], "is a folder; name a file"),
        (["--folder", str(tmp_path / "absent")], "absent: is not a folder in which this user can write"),
        (["--seconds", "-5"], "--seconds: -5; write a number above 0"),
        (["--seconds", "0"], "--seconds: 0; write a number above 0"),
        (["--only", "no such check"], "--only: no such check: no check has a name that begins so"),
        (["--processes", "0"], "--processes: 0; write 1 or more"),
    ):
        with pytest.raises(SystemExit) as left:
            gpu_check.main(given)
        assert left.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("DS_ACCELERATOR", "GPU")
    with pytest.raises(SystemExit):
        gpu_check.main(["--list"])
    assert "DS_ACCELERATOR: 'GPU'; set it to cpu or cuda" in capsys.readouterr().err


def test_an_interrupted_call_keeps_what_it_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(check: Check, *_: object) -> Outcome:
        if check.name == "rows: sums":
            raise KeyboardInterrupt
        return Outcome(check.name, "passed")

    monkeypatch.setattr(gpu_check, "_outcome", outcome)
    found = tmp_path / "found.json"
    assert gpu_check.main(["--only", "rows: hashing", "rows: sums", "rows: updates", "--json", str(found)]) == 1
    statuses = {name: check["status"] for name, check in outcomes(found).items()}
    assert statuses == {"rows: hashing": "passed", "rows: sums": "not run", "rows: updates": "not run"}
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 2 not run"


def test_time_during_which_the_device_is_busy() -> None:
    def busy(*spans: tuple[float, float]) -> float:
        return busy_seconds([Span("kernel", start, stop) for start, stop in spans])

    assert busy() == 0.0
    assert busy((5.0, 6.0), (0.0, 2.0), (1.0, 3.0)) == pytest.approx(4.0)
    assert busy((0.0, 9.0), (1.0, 2.0)) == pytest.approx(9.0)


def test_only_what_ran_on_the_device_counts() -> None:
    """Not operators of the host, nor ranges that code has named, such as an optimizer's step."""

    def event(name: str, device: DeviceType, stop: float, *, named: bool = False) -> FunctionEvent:
        return FunctionEvent(
            id=1, name=name, thread=0, start_us=1e6, end_us=stop, device_type=device, is_user_annotation=named
        )  # fmt: skip

    events = [
        event("aten::mul", DeviceType.CPU, 9e6),
        event("Optimizer.step", DeviceType.CUDA, 8e6, named=True),
        event("adamw_kernel", DeviceType.CUDA, 3e6),
    ]
    assert device_spans(events) == [Span("adamw_kernel", 1.0, 3.0)]


def test_seconds_of_a_call_on_the_cpu() -> None:
    """The host does the work itself there, so the device's time and the host's are both that of the call."""
    cpu = torch.device("cpu")
    assert 0.02 <= device_seconds_of(lambda: time.sleep(0.02), cpu, calls=8, warm=0) < 0.1
    assert 0.02 <= host_seconds_of(lambda: time.sleep(0.02), cpu, calls=8, rounds=1) < 0.1

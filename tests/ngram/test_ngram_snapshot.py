"""A snapshot holds one moment, bit for bit, whatever two threads and a device that works late do; and nobody waits for it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from overtok_megatron.ngram import snapshot as snapshot_module
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.copy_stream import CopyStream
from support.late_device import LateCopies, LateDevice, LateTensor, WaitedError

CPU = torch.device("cpu")
ROW_BYTES = 3 * 4 + 2 + 1  # of the columns below


def some_columns(count: int) -> dict[str, Tensor]:
    return {
        "weight": torch.randn(count, 3),
        "state": torch.randn(count).bfloat16(),
        "touched": torch.zeros(count, dtype=torch.uint8),
    }


def some_rows(dice: Random, count: int, most: int) -> Tensor:
    return torch.tensor(sorted(dice.sample(range(count), k=dice.randint(0, min(count, most)))), dtype=torch.int64)


def change(columns: dict[str, Tensor], rows: Tensor, number: int) -> None:
    """What the update of step `number` does to rows."""
    columns["weight"][rows] += number
    columns["state"][rows] -= number
    columns["touched"][rows] = number % 256


class Turns:
    """Two threads of which one runs at a time; where `switch` is called, the dice decide which one goes on."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._condition = threading.Condition()
        self._alive = {"MainThread", "save"}
        self._turn = dice.choice(["MainThread", "save"])
        self.eagerness = dice.choice([0.05, 0.3, 0.6])  # how readily a turn is given away

    def switch(self) -> None:
        me = threading.current_thread().name
        with self._condition:
            if self._dice.random() < self.eagerness and len(self._alive) == 2:
                (self._turn,) = self._alive - {me}
                self._condition.notify_all()
            self.wait(me)

    def wait(self, me: str) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self._turn == me, timeout=20), (
                "a lock was held in a call of the stream"
            )

    def end(self, me: str) -> None:
        with self._condition:
            self._alive.discard(me)
            self._turn = next(iter(self._alive), "nobody")
            self._condition.notify_all()


def run_together(
    turns: Turns, save: Callable[[], list[dict[str, Tensor]]], train: Callable[[], None]
) -> dict[str, Tensor]:
    """What `save` takes on a thread of its own, while the calling thread trains."""
    parts: list[dict[str, Tensor]] = []
    errors: list[BaseException] = []

    def saving() -> None:
        turns.wait("save")
        try:
            parts.extend(save())
        except BaseException as error:  # raised below
            errors.append(error)
        finally:
            turns.end("save")

    thread = threading.Thread(target=saving, name="save")
    thread.start()
    try:
        train()
    finally:
        turns.end("MainThread")
        thread.join()
    for error in errors:
        raise error
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def limits(piece_rows: int = 1, unsorted_bytes: int = 0) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_module, "PIECE_BYTES", piece_rows * ROW_BYTES)
        patch.setattr(snapshot_module, "_UNSORTED_BYTES", unsorted_bytes)
        yield


def check_a_late_device(seed: int) -> None:
    dice = Random(seed)
    torch.manual_seed(seed)
    turns, device = Turns(dice), LateDevice(dice)
    haste = dice.choice([0, 1, 4])  # how much the device does of itself

    def pause() -> None:
        for _ in range(dice.randint(0, haste)):
            device.advance()
        turns.switch()

    count = dice.randint(1, 30)
    live = some_columns(count)  # changed when the device comes to it
    truth = {name: column.clone() for name, column in live.items()}  # changed when it is asked
    columns = {name: device.put(column) for name, column in live.items()}
    memory = {name: column.values for name, column in columns.items()}
    selected = torch.arange(count)
    selection: LateTensor | None = None
    if dice.random() < 0.5:
        selected = some_rows(dice, count, count)
        selection = device.put(selected)
    stream = LateCopies(device)

    def step(number: int, snapshot: RowSnapshot | None) -> None:
        rows = some_rows(dice, count, 12)
        if snapshot is not None:
            snapshot.preserve(device.put(rows))
        change(truth, rows, number)
        device.launch(lambda: change(memory, rows, number))
        device.pause()

    step(1, None)
    with limits(dice.randint(1, 8)):
        snapshot = RowSnapshot(columns, stream, selection)
    expected = {name: column[selected] for name, column in truth.items()}
    device.pause = pause

    def train() -> None:
        turns.wait("MainThread")
        for number in range(2, dice.choice([3, 6, 12])):
            step(number, snapshot)

    def save() -> list[dict[str, Tensor]]:
        ends = sorted(dice.randint(0, len(selected)) for _ in range(dice.randint(0, 2)))
        return [snapshot.take(end) for end in (*ends, len(selected))]

    with limits(unsorted_bytes=dice.choice([0, 200, 10**6])):
        taken = run_together(turns, save, train)
    while device.advance():
        pass
    for name, values in expected.items():
        assert torch.equal(taken[name], values), name
        assert torch.equal(memory[name], truth[name]), name  # the device did all that it was asked


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_one_moment_on_a_device_that_works_late(seed: int) -> None:
    check_a_late_device(seed)


@pytest.mark.parametrize("seed", range(20))
def test_updates_launched_before_belong_to_the_moment(seed: int) -> None:
    device = LateDevice(Random(seed))
    column = device.put(torch.zeros(5, 3))
    values = column.values
    device.launch(lambda: values.add_(1.0))
    snapshot = RowSnapshot({"weight": column}, LateCopies(device))
    taken: list[Tensor] = []
    thread = threading.Thread(target=lambda: taken.append(snapshot.take(5)["weight"]), name="save")
    thread.start()
    thread.join()
    assert torch.equal(taken[0], torch.ones(5, 3))


@pytest.mark.slow
@settings(deadline=None, max_examples=5000)
@given(seed=st.integers(0, 2**32))
def test_one_moment_on_a_device_that_works_late_many_times(seed: int) -> None:
    check_a_late_device(seed)


@pytest.mark.parametrize("selected", [False, True])
def test_one_moment_in_host_memory(selected: bool) -> None:
    """Both threads really at once: a row that is read while it changes comes out as it was."""
    count = 300_000
    columns = some_columns(count)
    rows = torch.arange(0, count, 3) if selected else None
    expected = {name: column[slice(None) if rows is None else rows].clone() for name, column in columns.items()}
    with limits(piece_rows=256):
        snapshot = RowSnapshot(columns, CopyStream(CPU), rows)
    taken: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: taken.extend(snapshot.take(end) for end in (7001, snapshot.count)))
    thread.start()
    number, steps_beside = 0, 0
    while thread.is_alive():
        number += 1
        changed = torch.arange(number % 7, count, 7)
        snapshot.preserve(changed)
        steps_beside += thread.is_alive()
        change(columns, changed, number)
    assert steps_beside > 0
    for name, values in expected.items():
        assert torch.equal(torch.cat([part[name] for part in taken]), values), name


def kept_rows(snapshot: RowSnapshot) -> int:
    """Of how many rows a copy was sorted, and is still needed."""
    return sum(len(numbers) for numbers, _ in snapshot._kept)


def test_what_is_kept_is_bounded() -> None:
    """One copy of a row at most, beside those that the save's thread has yet to sort; none once all rows were taken."""
    columns = some_columns(100)
    step_bytes = 40 * (ROW_BYTES + 8)
    with limits(unsorted_bytes=3 * step_bytes):
        snapshot = RowSnapshot(columns, CopyStream(CPU))
        for number in range(20):
            snapshot.preserve(torch.arange(number % 2, 80, 2))
            assert snapshot._unsorted_bytes <= 3 * step_bytes
        assert kept_rows(snapshot) == 80
        snapshot.take(100)
        snapshot.preserve(torch.arange(40))
        assert kept_rows(snapshot) == snapshot._unsorted_bytes == 0


class _CopiesOfNothing(CopyStream):
    """Of fake tensors, for which there are no streams."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.is_host = False

    def _keep(self, tensor: Tensor) -> None:
        assert tensor.device.type == "cuda"


def test_no_operator_waits_for_a_gpu() -> None:
    """On fake CUDA tensors, a value that the host asks for raises, and so do tensors on two devices."""
    with FakeTensorMode():
        with torch.device("cuda:0"):
            columns, rows = some_columns(100), torch.arange(40)
        snapshot = RowSnapshot(columns, _CopiesOfNothing(), rows)
        snapshot.preserve(rows)
        (kept,) = snapshot._unsorted
        assert {value.device for value in (kept.rows, *kept.values.values())} == {CPU}
        assert {name: value.shape[0] for name, value in kept.values.items()} == dict.fromkeys(columns, 40)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            rows.sum().item()  # the mode would have told


@pytest.mark.parametrize(
    "ask",
    [
        lambda values: values[0, 0].item(),
        lambda values: values.cpu().clone(),
        lambda values: bool((values > 0).any()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: torch.empty(4, 3).copy_(values),
    ],
)
def test_the_late_device_tells_of_a_wait(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises(WaitedError):
        ask(LateDevice(Random(0)).put(torch.randn(4, 3)))

"""Reads beside the stream that computes: what they wait for, with streams that only note what is asked of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from overtok_megatron.parallel.early_reads import EarlyReads


class FakeStream:
    """A stream that notes what is asked of it; moments are numbered in the order in which they are recorded."""

    def __init__(self, notes: list[str], name: str, device: torch.device) -> None:
        self.notes, self.name, self.device = notes, name, device

    def record_event(self) -> int:
        number = sum(note.startswith("record") for note in self.notes)
        self.notes.append(f"record {number} on {self.name}")
        return number

    def wait_event(self, number: int) -> None:
        self.notes.append(f"{self.name} waits for {number}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    computing = FakeStream(found, "computing", torch.device("cuda:0"))

    def stream(device: torch.device, priority: int) -> FakeStream:
        assert priority < 0  # before the stream that computes, whose priority is 0
        return FakeStream(found, "reading", device)

    @contextmanager
    def entered(of: Any) -> Iterator[None]:
        found.append(f"enter {of.name}")
        yield
        found.append(f"leave {of.name}")

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return found


def read(reads: EarlyReads, notes: list[str]) -> None:
    with reads.stream():
        notes.append("read")


def test_a_read_waits_for_the_first_mark_of_its_step(notes: list[str]) -> None:
    reads = EarlyReads(torch.device("cuda:0"))
    for step in range(2):
        reads.begin_step()
        reads.mark()
        reads.mark()  # the optimizer steps once for each of its parameter groups
        read(reads, notes)
        read(reads, notes)
        one = [f"reading waits for {step}", "enter reading", "read", "leave reading"]
        assert notes[-9:] == [f"record {step} on computing", *one, *one]
    assert len(notes) == 18


def test_without_a_mark_a_read_stays_where_it_is(notes: list[str]) -> None:
    reads = EarlyReads(torch.device("cuda:0"))
    reads.mark()
    reads.begin_step()
    read(reads, notes)
    assert notes == ["record 0 on computing", "read"]


def test_on_the_cpu_nothing_is_asked_of_streams(notes: list[str]) -> None:
    reads = EarlyReads(torch.device("cpu"))
    reads.mark()
    read(reads, notes)
    assert notes == ["read"]

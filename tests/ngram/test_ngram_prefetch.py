"""Steps that are planned ahead on a thread: the same plans, few messages, and failures that surface."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram import exchange as exchange_module
from overtok_megatron.ngram.building import build_tables
from overtok_megatron.ngram.exchange import FlatExchange, Plan
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.row_space import RowSpace, TableGroup
from overtok_megatron.parallel import collectives
from overtok_megatron.parallel.uploading import Upload, pack, unpack
from overtok_megatron.parallel.worker import Worker
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, Layout, layout_config, own_tokens, stream


def assert_same_plan(found: Any, wanted: Any) -> None:
    """Two plans are equal in every tensor and every count."""
    assert type(found) is type(wanted)
    if isinstance(found, Tensor):
        assert torch.equal(found, wanted)
    elif is_dataclass(found):
        for field in fields(found):
            assert_same_plan(getattr(found, field.name), getattr(wanted, field.name))
    else:
        assert found == wanted


def family() -> NgramHash:
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=61, width=4, added=(TableGroup((2,), 1, 23, frozen=True),))
    return NgramHash(space=space, base=50, pad_id=0, boundary="reset", eod_id=7)


def test_the_threads_plan_is_the_one_made_at_once() -> None:
    """By other kernels, with rows that are frozen."""
    hashing, tokens = family(), torch.randint(0, 50, (2, 3, 17), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"trained_rows": hashing.trained_rows}
    at_once = FlatExchange((0, hashing.total_rows), None, kernels=RowKernels(), **settings)
    own = choose_kernels("auto", CPU).rows
    assert type(own) is not RowKernels
    ahead = FlatExchange((0, hashing.total_rows), None, kernels=own, **settings)

    def row_ids(tokens: Tensor | None, *, overlap: int) -> Tensor:
        assert tokens is not None and overlap == 0
        return hashing.with_kernels(own).row_ids(tokens)

    prefetch = Prefetch(row_ids, ahead, Upload(CPU), None)
    prefetch.start(tokens)
    prefetch.start(tokens + 1)
    for number in (0, 1):
        wanted = at_once.plan(hashing.row_ids(tokens + number))
        assert_same_plan(prefetch.take().plan, wanted)
        assert wanted.gradients is not None and wanted.gradients.kept is not None
        evaluated = prefetch.once(tokens + number).plan
        assert_same_plan(evaluated, replace(wanted, gradients=None))


def plans_of_ranks(over: dict[str, Any]) -> None:
    """One rank's work: compare a plan that its tables made ahead with one that their own exchange makes."""
    config = layout_config(Layout({}, over=over))
    grid = start_processes(config, CPU)
    kernels = choose_kernels("auto", CPU)
    tables = build_tables(config, EOD, device=CPU, kernels=kernels, group=grid.table_group)
    tokens = stream()[grid.rank, :, :-1]
    for part in (tokens, tokens.flip(0), None if grid.rank else tokens):
        tables.announce(part)
        plan: Plan = tables.fetch_rows(part, training=True).rows.plan
        assert_same_plan(plan, tables.exchange.plan(tables.row_ids(part)))


@pytest.mark.parametrize("over", [{}, {"ranks_per_host": 1}])
def test_plans_on_ranks_are_those_made_at_once(over: dict[str, Any]) -> None:
    run_ranks(2, plans_of_ranks, over)


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[bool, str]]]:
    """Of every collective of this package within: whether it ran on the main thread, and its name."""
    found: list[tuple[bool, str]] = []

    def span(operation: str, group: dist.ProcessGroup) -> record_function:
        found.append((threading.current_thread() is threading.main_thread(), operation))
        return record_function(operation)

    modules: list[Any] = [exchange_module, collectives]
    originals = [module.profiler_span for module in modules]
    for module in modules:
        module.profiler_span = span
    try:
        yield found
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.profiler_span = original


Collectives = tuple[list[str], list[str], list[str]]


def collectives_of_a_step(over: dict[str, Any]) -> Collectives:
    """One rank's work: the collectives of a step on the main thread, before the model computes and after, and the thread's."""
    config = layout_config(Layout({"zero_stage": 1}, over=over))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    tables, part = engine.tables, own_tokens(engine, stream()[0])
    assert tables is not None
    engine.announce(part)
    with recorded_collectives() as found:
        engine.deepspeed_engine.module.register_forward_pre_hook(lambda *_: found.append((True, "forward")))
        for _ in range(3):
            tables.settle()
            found.clear()
            engine.announce(part)
            engine.step(part, 1e-3)
        tables.settle()
    main = [name for on_main, name in found if on_main]
    first = main.index("forward")
    after = [name for name in main[first:] if name != "forward"]
    return main[:first], after, [name for on_main, name in found if not on_main]


def collectives_of_steps(settings: list[dict[str, Any]]) -> list[Collectives]:
    """One rank's work: `collectives_of_a_step` for each setting."""
    return [collectives_of_a_step(over) for over in settings]


def test_a_step_exchanges_rows_and_gradients_and_nothing_else() -> None:
    """The main thread takes part in no collective before the first forward pass.

    The rows of the next step are sent behind the update. The thread plans the step after that, in one message. For rows on
    the host it also fetches them, and those that change.
    """
    before_update, report = ["all-to-all of gradients", "all-reduce of squares"], ["all-reduce of metrics"]
    planned = ["all-to-all of counts and ids"]
    fetched = ["all-to-all of rows", "all-to-all of marks of changing rows", "all-to-all of changed rows"]
    for of_device, of_host in run_ranks(2, collectives_of_steps, [{}, {"storage": "host"}]):
        assert of_device == ([], [*before_update, *report, "all-to-all of rows"], planned)
        assert of_host == ([], [*before_update, *report], [*planned, *fetched])


def losses_of_steps(over: dict[str, Any], announced: bool, between: bool) -> list[float]:
    """One rank's work: losses of steps, announced or not, with an evaluation between each step and the next or without."""
    config = layout_config(Layout({"zero_stage": 1}, over=over))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    tables, batches = engine.tables, [own_tokens(engine, batch) for batch in stream()[:5]]
    assert tables is not None
    losses: list[float] = []
    for number, batch in enumerate(batches):
        for ahead in batches[:2] if number == 0 else batches[number + 1 : number + 2]:
            if announced:
                engine.announce(ahead)
        losses.append(engine.step(batch, 1e-2).loss)
        assert tables.any_announced == (announced and number + 1 < len(batches))
        assert (tables._under_way is not None) == tables.any_announced  # its rows travel already
        if between:
            losses.append(engine.evaluate([engine.inputs_and_targets(batches[-1][0])])[0])
    return losses[1::2] if between else losses


def steps_in_all_ways(over: dict[str, Any]) -> list[list[float]]:
    """One rank's work: losses of steps that are announced or not, and of evaluations between such steps."""
    ways = [(announced, between) for between in (False, True) for announced in (True, False)]
    return [losses_of_steps(over, announced, between) for announced, between in ways]


@pytest.mark.parametrize("over", [{}, {"ranks_per_host": 1}])
def test_rows_that_travel_early_are_those_of_the_update(over: dict[str, Any]) -> None:
    """Bit for bit: rows that are read behind the update of the step before, and evaluations while they travel."""
    for ahead, at_once, evaluated_ahead, evaluated_at_once in run_ranks(2, steps_in_all_ways, over):
        assert ahead == at_once
        assert evaluated_ahead == evaluated_at_once
        assert len(set(evaluated_ahead)) == len(evaluated_ahead)


def test_jobs_run_in_order_and_a_failure_is_the_last() -> None:
    worker, done = Worker("test", CPU), list[int]()
    first = worker.submit(lambda: done.append(1))
    error = KeyError("of the job")

    def fail() -> None:
        raise error

    failed, later = worker.submit(fail), worker.submit(lambda: done.append(2))
    assert first.result() is None
    for future in (failed, later):
        with pytest.raises(KeyError) as raised:
            future.result()
        assert raised.value is error
    with pytest.raises(KeyError):
        worker.wait()
    assert done == [1]


def test_the_threads_loops_have_as_many_threads_as_the_main_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert Worker("test", CPU).submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("training", [True, False])
def test_a_failure_to_plan_surfaces_where_the_rows_are_asked_for(training: bool) -> None:
    config = layout_config(Layout({}, over={"storage": "host"}))
    tables = build_tables(config, EOD, device=CPU, kernels=choose_kernels("auto", CPU))
    with pytest.raises(RuntimeError, match="zero-dimensional"):
        tables.fetch_rows(torch.tensor(3), training=training)


def test_a_process_leaves_although_a_job_never_ends() -> None:
    program = (
        "import threading, torch\n"
        "from overtok_megatron.parallel.worker import Worker\n"
        "worker = Worker('test', torch.device('cpu'))\n"
        "worker.submit(threading.Event().wait)\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


def test_a_plan_travels_as_one_tensor() -> None:
    hashing = family()
    exchange = FlatExchange((0, hashing.total_rows), None, trained_rows=hashing.trained_rows)
    plan = exchange.plan(hashing.row_ids(torch.randint(0, 50, (2, 3, 17))))
    packed, starts = pack(plan, pinned=False)
    assert all(start % 16 == 0 for start in starts.values())
    copy = unpack(plan, packed.clone(), starts)
    assert_same_plan(copy, plan)
    assert copy.slots.untyped_storage().data_ptr() == copy.step_rows.untyped_storage().data_ptr()

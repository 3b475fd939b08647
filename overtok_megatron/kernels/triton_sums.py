"""Sums of the look-ups' gradients by row on CUDA through Triton, in an order that depends on the row's own look-ups alone.

A row with at most SEGMENT look-ups is summed by one program, which adds them one after the other, as on the CPU; where rows
are narrow a program takes several. The look-ups of a longer row are cut into segments of SEGMENT, counted from the row's
first look-up. Other programs of the same launch sum one segment each into a scratch buffer, in the same way, and a second
kernel adds the segments of each long row. There are no atomics, and the bits of a row's sum depend neither on the number of
programs nor on the other rows. (Equal spans of the sorted look-ups, joined where a row crosses from one to the next, would
divide the work more evenly, but would cut a row at a place that depends on the rows before it.)

The host does not know which rows are long, and does not wait for the device to learn it. The positions of the sorted look-ups
are divided into windows of SEGMENT. At most one first segment of a long row begins in a window, because the next long row
begins more than SEGMENT look-ups later, and at most one later segment. Their places in the scratch buffer, which is float32
[2 * ceil(N / SEGMENT), w], are therefore 2 * window for a later segment and 2 * window + 1 for a first one. A program that
finds no segment for its places ends early. The buffer takes 1/16 of the memory of bfloat16 gradients.

Shapes: N look-ups, U rows, w row width; sorted_lookups as in rows.DistinctIds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from overtok_megatron.kernels.rows import RowGradientSums

SEGMENT = 64  # look-ups: half as many would double the scratch buffer, twice as many would keep single programs busy for longer
WINDOWS = 16  # how many windows a program of add_segments_kernel searches for the beginning of a long row
_SEGMENT = tl.constexpr(SEGMENT)


@triton.jit
def _bounds(sorted_lookups, ends, at, here):
    """The row of the look-ups at positions `at`, and the positions [begin, end) of the row's look-ups; 0 where not here."""
    row = tl.load(sorted_lookups + at, mask=here, other=0) >> 32
    begin = tl.load(ends + row - 1, mask=here & (row > 0), other=0)
    return row, begin, tl.load(ends + row, mask=here, other=0)


@triton.jit
def _segments(sorted_lookups, ends, place, lookups):
    """The first position and the number of look-ups of the segments at places of the scratch buffer; 0 where there is none."""
    opening = (place >> 1) * _SEGMENT
    here = opening < lookups
    closing = tl.minimum(opening + _SEGMENT, lookups) - 1
    first = (place & 1) == 1
    _, begin, end = _bounds(sorted_lookups, ends, tl.where(first, closing, opening), here)
    at = tl.where(first, begin, opening + ((begin - opening) & (_SEGMENT - 1)))
    begins = tl.where(first, begin >= opening, (begin < opening) & (at < end))
    return at, tl.where(begins & (end - begin > _SEGMENT), tl.minimum(end - at, _SEGMENT), 0)


@triton.jit
def _lookup(packed, here):
    return tl.load(packed, mask=here, other=0).to(tl.uint32)


@triton.jit
def _gradient(grad, lookup, here, columns, WIDTH: tl.constexpr):
    at = grad + lookup.to(tl.int64)[:, None] * WIDTH + columns
    return tl.load(at, mask=here[:, None] & (columns < WIDTH), other=0.0)


@triton.jit
def _sum_lookups(
    grad, sorted_lookups, at, count, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums [ROWS, COLUMNS] of the gradients of `count` look-ups from the positions `at` on, added one after the other.

    Four gradients and the next four look-ups are loaded before the gradients are added. This is written out because the
    compiler does not move loads of a loop's next turn over additions.
    """
    added = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    packed = sorted_lookups + at
    left = count.to(tl.int32)
    lookup0 = _lookup(packed, left > 0)
    lookup1 = _lookup(packed + 1, left > 1)
    lookup2 = _lookup(packed + 2, left > 2)
    lookup3 = _lookup(packed + 3, left > 3)
    for _ in range(0, tl.max(left, axis=0), 4):
        grad0 = _gradient(grad, lookup0, left > 0, columns, WIDTH)
        grad1 = _gradient(grad, lookup1, left > 1, columns, WIDTH)
        grad2 = _gradient(grad, lookup2, left > 2, columns, WIDTH)
        grad3 = _gradient(grad, lookup3, left > 3, columns, WIDTH)
        packed += 4
        left -= 4
        lookup0 = _lookup(packed, left > 0)
        lookup1 = _lookup(packed + 1, left > 1)
        lookup2 = _lookup(packed + 2, left > 2)
        lookup3 = _lookup(packed + 3, left > 3)
        added += grad0.to(tl.float32)
        added += grad1.to(tl.float32)
        added += grad2.to(tl.float32)
        added += grad3.to(tl.float32)
    return added


@triton.jit(
    do_not_specialize=["lookups", "rows", "places"],
    do_not_specialize_on_alignment=["sorted_lookups", "ends", "squares"],
)
def add_kernel(
    grad, sorted_lookups, ends, total, squares, segments, lookups, rows, places,
    FRESH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of places of the scratch buffer (the first programs, because they take longest), or a block of short rows."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    segment_programs = tl.cdiv(places, ROWS)
    if tl.program_id(0) < segment_programs:
        first, count = _segments(sorted_lookups, ends, at, lookups)
        added = _sum_lookups(grad, sorted_lookups, first, count, columns, WIDTH, ROWS, COLUMNS)
        tl.store(segments + at[:, None] * WIDTH + columns, added, mask=(count > 0)[:, None] & (columns < WIDTH))
    else:
        row = at - segment_programs * ROWS
        here = row < rows
        begin = tl.load(ends + row - 1, mask=here & (row > 0), other=0)
        count = tl.load(ends + row, mask=here, other=0) - begin
        here = here & (count <= _SEGMENT)
        if not FRESH:
            here = here & (count > 0)  # the sums and squares of all other rows stay as they are
        count = tl.where(here, count, 0)
        added = _sum_lookups(grad, sorted_lookups, begin, count, columns, WIDTH, ROWS, COLUMNS)
        mask = here[:, None] & (columns < WIDTH)
        sum_at = total + row[:, None] * WIDTH + columns
        if not FRESH:
            added += tl.load(sum_at, mask=mask, other=0.0)
        tl.store(sum_at, added, mask=mask)
        tl.store(squares + row, tl.sum(added * added, axis=1), mask=here)


@triton.jit
def _segment(segments, number, count, columns, WIDTH: tl.constexpr):
    """Partial sums of a long row: segment 0 lies at place 1 from the row's window on, segment j at place 2j."""
    place = 2 * number + (number == 0).to(tl.int32)
    return tl.load(segments + place * WIDTH + columns, mask=(number < count) & (columns < WIDTH), other=0.0)


@triton.jit(do_not_specialize=["lookups"], do_not_specialize_on_alignment=["sorted_lookups", "ends", "squares"])
def add_segments_kernel(
    sorted_lookups, ends, segments, total, squares, lookups,
    FRESH: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """The sums of the long rows that begin in a block of windows, from their segments.

    Segment j goes to line j % LINES, in the order of j, and the lines are added at the end.
    """
    windows = tl.program_id(0).to(tl.int64) * WINDOWS
    opening = (windows + tl.arange(0, WINDOWS)) * _SEGMENT
    closing = tl.minimum(opening + _SEGMENT, lookups) - 1
    _, begins, stops = _bounds(sorted_lookups, ends, closing, opening < lookups)
    columns = tl.arange(0, COLUMNS)[None, :]
    lines = tl.arange(0, LINES)[:, None]
    if tl.max(tl.where(begins >= opening, stops - begins, 0), axis=0) > _SEGMENT:
        for window in range(windows, windows + WINDOWS):
            last = tl.minimum(window * _SEGMENT + _SEGMENT, lookups) - 1
            row, begin, end = _bounds(sorted_lookups, ends, last, window * _SEGMENT < lookups)
            if (begin >= window * _SEGMENT) & (end - begin > _SEGMENT):
                count = tl.cdiv(end - begin, _SEGMENT)
                own = segments + 2 * window * WIDTH
                added = tl.zeros([LINES, COLUMNS], dtype=tl.float32)
                for done in range(0, count, 4 * LINES):
                    part0 = _segment(own, done + lines, count, columns, WIDTH)
                    part1 = _segment(own, done + LINES + lines, count, columns, WIDTH)
                    part2 = _segment(own, done + 2 * LINES + lines, count, columns, WIDTH)
                    part3 = _segment(own, done + 3 * LINES + lines, count, columns, WIDTH)
                    added += part0
                    added += part1
                    added += part2
                    added += part3
                inside = tl.arange(0, COLUMNS) < WIDTH
                sum_at = total + row * WIDTH + tl.arange(0, COLUMNS)
                values = tl.sum(added, axis=0)
                if not FRESH:
                    values += tl.load(sum_at, mask=inside, other=0.0)
                tl.store(sum_at, values, mask=inside)
                tl.store(squares + row, tl.sum(values * values, axis=0))


def add_shape(width: int) -> tuple[dict[str, int], int]:
    """Compile-time sizes of add_kernel, and its number of warps.

    Programs are of one warp up to 1023 columns: a warp then waits for no other, and 32 programs, the most that run on a
    multiprocessor, leave 64 registers to each thread, enough to load four gradients of 8 values before they are added. They
    take at most four rows: the addresses of eight, of fewer than 33 columns, take so many registers that some are spilled.
    """
    columns = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, min(4, 256 // columns)), "COLUMNS": columns}, max(1, columns // 512)


def add_segments_shape(width: int) -> tuple[dict[str, int], int]:
    """Compile-time sizes of add_segments_kernel, and its number of warps: 8 or 16 values per thread."""
    columns = triton.next_power_of_2(width)
    lines = max(1, 2048 // columns)
    return {"WIDTH": width, "LINES": lines, "COLUMNS": columns, "WINDOWS": WINDOWS}, max(4, columns // 256)


def add_gradients(sums: RowGradientSums, sorted_lookups: Tensor, grad: Tensor, *, fresh: bool) -> None:
    """RowKernels.add on a CUDA device, for gradients and sums at addresses that are multiples of 16 bytes."""
    (lookups, width), rows, device = grad.shape, sums.total.shape[0], grad.device
    windows = triton.cdiv(lookups, SEGMENT) if lookups > SEGMENT else 0  # otherwise no row is long
    boundaries = torch.arange(2**32, (rows + 1) * 2**32, 2**32, device=device)  # what a row's packed look-ups are below
    ends = torch.searchsorted(sorted_lookups, boundaries)  # [U]
    segments = torch.empty(2 * windows, width, device=device)
    shape, warps = add_shape(width)
    programs = triton.cdiv(2 * windows, shape["ROWS"]) + triton.cdiv(rows, shape["ROWS"])
    add_kernel[(programs,)](
        grad, sorted_lookups, ends, sums.total, sums.row_squared_norms, segments, lookups, rows, 2 * windows,
        FRESH=fresh, **shape, num_warps=warps,
    )  # fmt: skip
    if windows > 0:
        shape, warps = add_segments_shape(width)
        add_segments_kernel[(triton.cdiv(windows, WINDOWS),)](
            sorted_lookups, ends, segments, sums.total, sums.row_squared_norms, lookups,
            FRESH=fresh, **shape, num_warps=warps,
        )  # fmt: skip

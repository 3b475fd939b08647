"""The dense part of an over-encoder: n-gram rows are projected to the hidden size and combined with the 1-gram embedding.

Shapes: b batch, s sequence (a slice of it under tensor parallelism), T tables, B of them base tables, w row width, d hidden
(B w unless row_width is configured).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.config.schema import Combine
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.parallel.collectives import copy_to_group
from overtok_megatron.parallel.splits import initialise


class NgramProjection(nn.Module):
    """Joins the gathered n-gram rows to the 1-gram embedding (paper section 3.2).

    The B projections W_s: w -> d of the base tables, summed, are one d x (B w) linear layer on the concatenation of the rows;
    so are the projections of each group of tables that was added later. combine, with e the embedding and o the projected
    rows: "sum" e + o; "mean" (e + o) / (1 + B), the paper's pseudo-code; "scaled" e + o / (1 + B). The share has B and not T,
    so that added tables do not rescale the parts that were trained before. group: the tensor-parallel group, whose ranks
    each see their own slice of the sequence.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tables: int,
        *,
        combine: Combine,
        row_width: int | None = None,
        added_tables: Sequence[int] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """num_tables: B. row_width: w; None = hidden_size / B. added_tables: how many tables each added group has."""
        super().__init__()
        assert row_width is not None or hidden_size % num_tables == 0
        self.num_tables = num_tables
        self.added_tables = tuple(added_tables)
        self.combine = combine
        self.group = group
        self.row_width = row_width or hidden_size // num_tables
        self.projection = nn.Parameter(torch.empty(hidden_size, num_tables * self.row_width))
        # Added groups have weights of their own: a product over more columns may sum in another order, and the outputs of the
        # base tables must keep their bits. Not a ParameterList, because ZeRO 3 gathers a module's own parameters only.
        for number, tables in enumerate(self.added_tables):
            weight = nn.Parameter(torch.empty(hidden_size, tables * self.row_width))
            self.register_parameter(f"added_projection_{number}", weight)

    def reset(self, seed: int, name: str) -> None:
        """Draw weights of deviation (B w)^-1/2, so that the n-gram part begins at the scale of its rows; added groups alike."""
        for key, weight in self.named_parameters():
            initialise(weight, weight.shape[1] ** -0.5, seed, f"{name}.{key}")

    def forward(self, fetched: FetchedRows) -> Tensor:
        """The n-gram part before combination: look-ups [b, s, T] -> [b, s, d]."""
        gathered = fetched.gather()  # [b, s, T, w]
        total: Tensor | None = None
        for part, weight in zip(
            gathered.split([self.num_tables, *self.added_tables], dim=-2), self.parameters(), strict=True
        ):
            whole = copy_to_group(weight, self.group)  # each rank saw a slice: the gradient is summed
            # Contiguous, so that this is the same product as in a model without the other groups: rows of zero change no bit.
            own = F.linear(part.flatten(-2).contiguous(), whole)
            total = own if total is None else total + own
        assert total is not None
        return total

    def join(self, base: Tensor | None, ngrams: Tensor) -> Tensor:
        """base, ngrams [b, s, d] -> [b, s, d] by the combination rule; base None = zeros, in a model without 1-grams."""
        share = 1.0 / (1 + self.num_tables)
        if base is None:
            return ngrams if self.combine == "sum" else ngrams * share
        if self.combine == "sum":
            return base + ngrams
        if self.combine == "mean":
            return (base + ngrams) * share
        return torch.add(base, ngrams, alpha=share)

    @torch.no_grad()
    def order_norms(self, fetched: FetchedRows, orders: tuple[int, ...]) -> dict[int, float]:
        """Mean L2 norm of each n-gram order's projected part; look-ups [.., s, T]; orders [T]: of each table."""
        gathered = fetched.gather()  # [.., s, T, w]
        weight = torch.cat(list(self.parameters()), dim=1).unflatten(1, (len(orders), self.row_width))  # [d, T, w]
        norms = {}
        for order in sorted(set(orders)):
            own = [table for table, table_order in enumerate(orders) if table_order == order]
            part = F.linear(gathered[..., own, :].flatten(-2), weight[:, own].flatten(1))
            norms[order] = part.float().norm(dim=-1).mean().item()
        return norms

    def extra_repr(self) -> str:
        added = f", added_tables={list(self.added_tables)}" if self.added_tables else ""
        return (
            f"hidden_size={self.projection.shape[0]}, num_tables={self.num_tables}{added}, "
            f"row_width={self.row_width}, combine={self.combine}"
        )

"""The exchange in two levels: rows that several ranks of a host look up cross the network once.

Shapes: U distinct rows that this rank looks up, R rows that this host's ranks request from this rank, H of them distinct, r
rows of this rank that a step updates, w row width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import RowGradientSums, RowKernels
from overtok_megatron.ngram.exchange import FlatExchange, FlatPlan, Plan, ReadRows, is_in
from overtok_megatron.ngram.row_space import RowFilter


@dataclass(kw_only=True)
class TwoLevelPlan(Plan):
    """host_plan: between the ranks of this host. network_plan: between hosts, of the H distinct rows that this host requests.

    network_slots int64 [R]: for each of the R requested rows, its index among the H distinct ones. network_rows [H, w]: the
    values of the distinct ones, once fetched.
    """

    host_plan: FlatPlan
    network_plan: FlatPlan
    network_slots: Tensor
    network_rows: Tensor


class TwoLevelExchange:
    """First an exchange between the ranks of a host, then one between hosts.

    Rank l of a host requests rows from the ranks l of all hosts, on behalf of its host: it collects what the ranks of its
    host look up of them. bounds: the first row id of each owner and the end, owners ordered by (l, host). host_group: this
    host's ranks. network_group: the ranks l of all hosts; None, for either, where it would have one rank. Gradients are
    summed over the host's ranks first, then over hosts: equal to FlatExchange to rounding.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        *,
        host_group: dist.ProcessGroup | None,
        network_group: dist.ProcessGroup | None,
        kernels: RowKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        trained_rows: RowFilter | None = None,
    ) -> None:
        hosts = 1 if network_group is None else dist.get_world_size(network_group)
        self.gradient_dtype = gradient_dtype
        self.host = FlatExchange(
            bounds[::hosts], host_group, kernels=kernels, gradient_dtype=gradient_dtype, trained_rows=trained_rows
        )
        first = self.host.rank * hosts
        self.network = FlatExchange(
            bounds[first : first + hosts + 1],
            network_group,
            kernels=kernels,
            gradient_dtype=gradient_dtype,
            trained_rows=trained_rows,
        )

    def plan(self, ids: Tensor) -> TwoLevelPlan:
        """Four all-to-alls: counts and ids, within the host and then between hosts."""
        host_plan = self.host.plan(ids)
        requested, network_slots, _ = self.host.distinct_requests(host_plan)
        return TwoLevelPlan(
            slots=host_plan.slots,
            sorted_lookups=host_plan.sorted_lookups,
            count=host_plan.count,
            host_plan=host_plan,
            network_plan=self.network.plan(requested + self.host.first_row_id),
            network_slots=network_slots,
            network_rows=ids.new_empty(0),
        )

    def fetch(self, plan: TwoLevelPlan, read: ReadRows) -> Tensor:
        """Two all-to-alls."""
        plan.network_rows = self.network.fetch(plan.network_plan, read)
        return self.host.fetch(plan.host_plan, lambda _: plan.network_rows[plan.network_slots])

    def refresh(self, plan: TwoLevelPlan, rows: Tensor, step_rows: Tensor, read: ReadRows) -> None:
        """Six small all-to-alls."""
        requested = plan.network_plan.requested_rows
        renewed = self.network.resend(
            plan.network_plan,
            plan.network_rows,
            is_in(requested, step_rows),
            lambda requests: read(requested[requests]),
        )
        stale = torch.zeros(plan.network_rows.shape[0], dtype=torch.bool, device=rows.device)
        stale.index_fill_(0, renewed, True)
        self.host.resend(
            plan.host_plan,
            rows,
            stale[plan.network_slots],
            lambda requests: plan.network_rows[plan.network_slots[requests]],
        )

    def send_gradients(self, plan: TwoLevelPlan, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """Two all-to-alls."""
        _, host_sums = self.host.send_gradients(plan.host_plan, lookup_gradients)
        # The exchange within the host has dropped the rows that take no updates already.
        network_plan, _ = self.network.trained_part(plan.network_plan)
        return self.network.send_all_gradients(network_plan, host_sums)

    def payload_bytes(self, plan: TwoLevelPlan, row_bytes: int, grad_bytes: int) -> int:
        within_host = self.host.payload_bytes(plan.host_plan, row_bytes, grad_bytes)
        return within_host + self.network_bytes(plan, row_bytes, grad_bytes)

    def network_bytes(self, plan: TwoLevelPlan, row_bytes: int, grad_bytes: int) -> int:
        """The part of payload_bytes that crosses hosts."""
        return self.network.payload_bytes(plan.network_plan, row_bytes, grad_bytes)

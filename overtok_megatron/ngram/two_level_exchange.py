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
from overtok_megatron.ngram.exchange import Fetching, FlatExchange, FlatPlan, Plan, ReadRows
from overtok_megatron.ngram.row_space import RowFilter


@dataclass(kw_only=True)
class TwoLevelPlan(Plan):
    """host_plan: between the ranks of this host. network_plan: between hosts, of the H distinct rows that this host requests.

    network_slots int64 [R]: for each of the R requested rows, its index among the H distinct ones.
    """

    host_plan: FlatPlan
    network_plan: FlatPlan
    network_slots: Tensor

    @property
    def step_rows(self) -> Tensor:
        return self.network_plan.step_rows


class TwoLevelExchange:
    """First an exchange between the ranks of a host, then one between hosts.

    Rank l of a host requests rows from the ranks l of all hosts, on behalf of its host: it collects what the ranks of its
    host look up of them. bounds: the first row id of each owner and the end, owners ordered by (l, host). host_group: this
    host's ranks. network_group: the ranks l of all hosts; None, for either, where it would have one rank. Gradients are
    summed over the host's ranks first, then over hosts: equal to FlatExchange to rounding. pin_rows: as in FlatExchange.
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
        pin_rows: bool = False,
    ) -> None:
        hosts = 1 if network_group is None else dist.get_world_size(network_group)
        self.gradient_dtype = gradient_dtype
        self.host = FlatExchange(
            bounds[::hosts],
            host_group,
            kernels=kernels,
            gradient_dtype=gradient_dtype,
            trained_rows=trained_rows,
            pin_rows=pin_rows,
        )
        first = self.host.rank * hosts
        self.network = FlatExchange(
            bounds[first : first + hosts + 1],
            network_group,
            kernels=kernels,
            gradient_dtype=gradient_dtype,
            trained_rows=trained_rows,
        )

    def plan(self, ids: Tensor, *, training: bool = True) -> TwoLevelPlan:
        """Two all-to-alls, within the host and then between hosts; each as FlatExchange.plan."""
        host_plan = self.host.plan(ids, training=training)
        requested, network_slots, _ = self.host.kernels.unique(host_plan.requested_rows, self.host.num_rows)
        no_lookups = requested[:0]  # they are those of the plan within the host
        return TwoLevelPlan(
            slots=host_plan.slots,
            sorted_lookups=host_plan.sorted_lookups,
            count=host_plan.count,
            host_plan=host_plan,
            network_plan=self.network.plan_distinct(
                requested + self.host.first_row_id, no_lookups, no_lookups, training=training
            ),
            network_slots=network_slots,
        )

    def start_fetch(self, plan: TwoLevelPlan, read: ReadRows) -> Fetching:
        """Two all-to-alls, of which the one within the host begins when the result is asked for."""
        from_hosts = self.network.start_fetch(plan.network_plan, read)

        def arrived() -> Tensor:
            network_rows = from_hosts()  # [H, w]
            return self.host.start_fetch(plan.host_plan, lambda _: network_rows[plan.network_slots])()

        return arrived

    def tell_changes(self, plan: TwoLevelPlan, changing: RowFilter) -> None:
        """Two all-to-alls, of a byte per row."""
        network_plan = plan.network_plan
        network = self.network.mark_changes(network_plan, changing(network_plan.requested_rows))
        of_host = torch.zeros(network_plan.count, dtype=torch.bool, device=plan.slots.device)  # [H]
        of_host[network.slots] = True
        self.host.mark_changes(plan.host_plan, of_host[plan.network_slots])

    def fetch_changed(self, plan: TwoLevelPlan, read: ReadRows) -> tuple[Tensor, Tensor]:
        """Two all-to-alls."""
        network_slots, values = self.network.fetch_changed(plan.network_plan, read)  # ascending among H, [c, w]
        changes = plan.host_plan.changes
        assert changes is not None, "nobody told of changes"
        index = torch.searchsorted(network_slots, plan.network_slots[changes.requests])
        return changes.slots, self.host.send_changed(changes, values[index])

    def send_gradients(self, plan: TwoLevelPlan, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """Two all-to-alls."""
        _, host_sums = self.host.send_gradients(plan.host_plan, lookup_gradients)
        assert plan.network_plan.gradients is not None
        # The exchange within the host has dropped the rows that take no updates already.
        return self.network.send_kept_gradients(plan.network_plan.gradients, host_sums)

    def payload_bytes(self, plan: TwoLevelPlan, row_bytes: int, grad_bytes: int) -> int:
        within_host = self.host.payload_bytes(plan.host_plan, row_bytes, grad_bytes)
        return within_host + self.network_bytes(plan, row_bytes, grad_bytes)

    def network_bytes(self, plan: TwoLevelPlan, row_bytes: int, grad_bytes: int) -> int:
        """The part of payload_bytes that crosses hosts."""
        return self.network.payload_bytes(plan.network_plan, row_bytes, grad_bytes)

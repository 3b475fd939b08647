"""One adapter per optimizer class of DeepSpeed: where the joint norm enters, how state is set, what must be reset.

DeepSpeed chooses the class by precision and ZeRO stage. Each computes the gradient norm and clips in a place of its own, so
each adapter patches another method, which runs once per step on every rank, after the last backward pass:

| precision, ZeRO stage | class | patched method |
| any, 1 and 2 (with bf16 only 2) | DeepSpeedZeroOptimizer | scaled_global_norm |
| any, 3 | DeepSpeedZeroOptimizer_Stage3 | _get_norm_groups |
| bf16, 1 | BF16_Optimizer | get_grads_for_norm |
| bf16, 0 | FP16_UnfusedOptimizer, with apex's AdamW FP16_Optimizer | unscale_and_clip_grads |
| fp32, 0 | none, the torch optimizer itself | a hook before its step, which clips |
"""

from typing import Any, Protocol

import torch
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import Tensor, nn

from overtok_megatron.checkpoint.deepspeed_state import MOMENTS, ParameterState
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.collectives import all_reduce_in_place
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import is_tied_copy, splits_of


class ReduceAndSquare(Protocol):
    """Sends row gradients to their owners, at the first call of a step; all ranks must call it.

    Returns their sum of squares over all ranks, a float64 scalar, on `device`; None = where it is.
    """

    def __call__(self, device: torch.device | None = None) -> Tensor: ...


class OptimizerAdapter:
    """What the training engine asks of DeepSpeed's optimizer, whatever its class.

    max_norm: the joint gradient norm to which gradients are clipped; 0 = the norm is measured, and nothing is clipped.
    needs_state_reset: the class steps once on zero gradients when it is made, to allocate Adam's state; without a reset of
    that state, bias correction would start one step ahead.
    """

    needs_state_reset = False

    def __init__(self, deepspeed_engine: Any, grid: ProcessGrid, max_norm: float) -> None:
        self.deepspeed_engine = deepspeed_engine
        self.optimizer = deepspeed_engine.optimizer
        self.grid = grid
        self.max_norm = max_norm

    def join_norm(self, reduce_and_square: ReduceAndSquare) -> None:
        """Patch DeepSpeed so that its gradient norm, by which it clips dense gradients, includes the row gradients."""
        raise NotImplementedError

    def global_norm(self) -> Tensor | float:
        """The joint norm of the last step, before clipping: a scalar on a device, or where DeepSpeed read it a number."""
        norm: Tensor | float = self.deepspeed_engine.get_global_grad_norm()
        return norm

    def set_max_norm(self, max_norm: float) -> None:
        """Clip to another norm from the next step on."""
        self.max_norm = max_norm
        self.optimizer.clip_grad = max_norm

    def clip_factor(self, norm: float) -> float:
        """What gradients of this joint norm are multiplied by."""
        return self.max_norm / (norm + 1e-6) if 0 < self.max_norm < norm + 1e-6 else 1.0

    @torch.no_grad()
    def set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Put a parameter's master weight, moments and step count where the optimizer keeps them, and its value in place.

        state: this tensor-parallel rank's part. Needs no other rank. Raises CheckpointError where the class has no such way.
        """
        self._set_state(parameter, state)

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def set_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter that is not trained, which the optimizer does not know. value: this tensor-parallel rank's part."""
        parameter.data.copy_(value)


class TorchOptimizer(OptimizerAdapter):
    """float32 without ZeRO: DeepSpeed steps on the torch optimizer itself, and the norm and clipping are done here."""

    def join_norm(self, reduce_and_square: ReduceAndSquare) -> None:
        self._norm = torch.zeros(())

        def clip(*_: Any) -> None:
            self._norm = (self._dense_square() + reduce_and_square()).sqrt()
            if self.max_norm > 0:  # multiplies by 1 where nothing is to be clipped, which needs no look at the norm
                torch.nn.utils.clip_grads_with_norm_(self._parameters(), self.max_norm, self._norm)

        # DeepSpeed's own clipping, which knows the dense gradients only, runs before the optimizer's step.
        self.deepspeed_engine.clip_fp32_gradients = lambda: None
        self.optimizer.register_step_pre_hook(clip)

    def global_norm(self) -> Tensor:
        return self._norm

    def set_max_norm(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def _parameters(self) -> Any:
        return self.deepspeed_engine.module.parameters()

    def _dense_square(self) -> Tensor:
        """Sum of squares of dense gradients over the ranks of one copy of the model, each value once: a float64 scalar.

        A split parameter counts on every tensor-parallel rank, an unsplit one on the first; the second copy of a tied weight
        does not count.
        """
        gradients = [
            parameter.grad
            for parameter in self._parameters()
            if (self.grid.tensor_rank == 0 or splits_of(parameter)) and not is_tied_copy(parameter)
            if parameter.grad is not None
        ]
        total = _sum_of_squares(gradients, torch.float64, self.deepspeed_engine.device)
        all_reduce_in_place(total, self.grid.replica_group, of="squares")
        return total

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        parameter.data.copy_(state.values["master"])
        _set_moments(self.optimizer, parameter, state)


class Zero1Or2(OptimizerAdapter):
    """DeepSpeedZeroOptimizer: one flat partition of each parameter group on every rank."""

    def join_norm(self, reduce_and_square: ReduceAndSquare) -> None:
        dense_norm = self.optimizer.scaled_global_norm

        def joint_norm(*arguments: Any, **others: Any) -> Tensor:
            dense: Tensor = dense_norm(*arguments, **others)
            return (dense.double().square() + reduce_and_square(dense.device)).sqrt().to(dense.dtype)

        self.optimizer.scaled_global_norm = joint_norm

    def _flat_partitions(self) -> list[Tensor]:
        """float32 master weights, one flat tensor per parameter group."""
        partitions: list[Tensor] = self.optimizer.single_partition_of_fp32_groups
        return partitions

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        parameter.data.copy_(state.values["master"])
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # where DeepSpeed records what of it lies here
        if mapping is None:
            return  # this rank's partition holds nothing of the parameter; it may also hold all, or a part
        part, position = mapping.lp_fragment_address, mapping.hp_fragment_address

        def fragment(name: str) -> Tensor:
            return state.values[name].flatten().narrow(0, part.start, part.numel)

        mapping.hp_fragment.copy_(fragment("master"))
        flat = self._flat_partitions()[mapping.param_group_index]
        group = self.optimizer.optimizer.param_groups[mapping.param_group_index]
        moments = _allocated(self.optimizer.optimizer, group, flat, state.steps)
        for name in MOMENTS:
            moments[name].narrow(0, position.start, position.numel).copy_(fragment(name))


class Bf16Zero1(Zero1Or2):
    """BF16_Optimizer: partitioned like ZeRO 1, with a norm over lists of gradients, which it sums in float32."""

    def __init__(self, deepspeed_engine: Any, grid: ProcessGrid, max_norm: float) -> None:
        super().__init__(deepspeed_engine, grid, max_norm)
        self.optimizer._update_hp_grad = self._add_gradient
        self.optimizer.zero_grad = self._forget_gradients

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        """What DeepSpeed's engine calls after each update. The update has set the float32 sums to zero already.

        DeepSpeed's method would write the same zeros once more, 4 bytes per parameter.
        """
        self.optimizer.clear_lp_grads(set_to_none)

    @torch.no_grad()
    def _add_gradient(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add a parameter's bf16 gradient to its float32 sum, as DeepSpeed's method does, with the same bits.

        DeepSpeed makes a float32 copy of the gradient first: two kernels, which read and write 18 bytes per value, not 10.
        """
        if parameter.grad is None:
            return
        total = self.optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total  # type: ignore[attr-defined]  # by which pipelines sum the gradients of tied weights
        self.optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    def join_norm(self, reduce_and_square: ReduceAndSquare) -> None:
        dense_gradients = self.optimizer.get_grads_for_norm

        def joint_gradients(for_clipping: bool = False) -> Any:
            if for_clipping:
                # The gradients that the update of this rank reads, one flat tensor per parameter group. DeepSpeed would
                # multiply its view of each parameter's gradient, the other ranks' included.
                return self.optimizer.fp32_groups_gradient_flat_partition
            dense, experts = dense_gradients()
            rows = reduce_and_square()
            square = _sum_of_squares(dense, torch.float32, rows.device)
            # DeepSpeed sums over the ranks of a copy of the model, so the rows count on the first of them only.
            if self.grid.tensor_rank == 0 and self.grid.is_first_stage:
                square += rows
            # One value that has this norm, in place of all gradients: DeepSpeed would take the norm of each by itself.
            return [square.sqrt().float().reshape(1)], experts

        self.optimizer.get_grads_for_norm = joint_gradients

    def _flat_partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self.optimizer.fp32_groups_flat_partition
        return partitions


class Zero3(OptimizerAdapter):
    """DeepSpeedZeroOptimizer_Stage3: an equal part of every parameter on every rank, the last one padded."""

    def join_norm(self, reduce_and_square: ReduceAndSquare) -> None:
        dense_norms = self.optimizer._get_norm_groups

        def joint_norms() -> list[Any]:
            """The norm of row gradients is one more group, on the device of the others: the CPU with an offloaded optimizer."""
            dense = dense_norms()
            device = dense[0].device if dense and isinstance(dense[0], Tensor) else None
            return [*dense, reduce_and_square(device).sqrt().float()]

        self.optimizer._get_norm_groups = joint_norms

    @torch.no_grad()
    def set_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.ds_tensor.data.copy_(self._own_part(parameter, value))  # type: ignore[attr-defined]

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole value, flat and padded to the size of all parts."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = self.optimizer._get_param_partition_rank(parameter) * size
        values = value.flatten()[start : start + size]
        return torch.nn.functional.pad(values, (0, size - values.numel()))

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        optimizer = self.optimizer

        def part(name: str) -> Tensor:
            return self._own_part(parameter, state.values[name])

        sub_group, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
        _allocated(optimizer.optimizer, group, optimizer.fp32_partitioned_groups_flat[sub_group], state.steps)
        safe_set_local_fp32_param(parameter, part("master"))
        parameter.ds_tensor.data.copy_(part("master"))  # type: ignore[attr-defined]
        for name in MOMENTS:
            safe_set_local_optimizer_state(parameter, part(name), name)


class Bf16WithoutZero(OptimizerAdapter):
    """FP16_UnfusedOptimizer: float32 master weights in lists beside the parameters."""

    needs_state_reset = True
    _norm_argument = 0  # position of the norm among the arguments of unscale_and_clip_grads

    def join_norm(self, reduce_and_square: ReduceAndSquare) -> None:
        unscale_and_clip = self.optimizer.unscale_and_clip_grads

        def with_joint_norm(*arguments: Any, **others: Any) -> Any:
            values = list(arguments)
            dense = values[self._norm_argument]  # a number where DeepSpeed has read it, or a scalar on the device
            joint = (dense**2 + reduce_and_square()).sqrt()
            self.optimizer._global_grad_norm = values[self._norm_argument] = joint
            return unscale_and_clip(*values, **others)

        self.optimizer.unscale_and_clip_grads = with_joint_norm

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        parameter.data.copy_(state.values["master"])
        optimizer = self.optimizer
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for own, master in zip(parameters, masters, strict=True):
                if own is parameter:
                    master.data.copy_(state.values["master"])
                    _set_moments(optimizer.optimizer, master, state)
                    return
        raise AssertionError("a parameter that its optimizer does not know")


class FusedBf16WithoutZero(Bf16WithoutZero):
    """FP16_Optimizer, which DeepSpeed takes for apex's AdamW: flat float32 master weights;
    DeepSpeed does not record which slice belongs to which parameter."""

    _norm_argument = 1

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        raise CheckpointError(
            "parallel.zero_stage: 0; with bf16 and apex's AdamW it resumes on the layout that wrote the checkpoint only, and "
            "starts from no other weights; "
            "use 1, or training.kernels: auto"
        )


_ADAPTERS: dict[str, type[OptimizerAdapter]] = {
    "DeepSpeedZeroOptimizer": Zero1Or2,
    "DeepSpeedZeroOptimizer_Stage3": Zero3,
    "BF16_Optimizer": Bf16Zero1,
    "FP16_UnfusedOptimizer": Bf16WithoutZero,
    "FP16_Optimizer": FusedBf16WithoutZero,
}


def adapter_of(deepspeed_engine: Any, grid: ProcessGrid, max_norm: float) -> OptimizerAdapter:
    """The adapter for the optimizer that DeepSpeed made. max_norm: to which gradients are clipped, 0 = they are not."""
    optimizer = deepspeed_engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchOptimizer(deepspeed_engine, grid, max_norm)
    name = type(optimizer).__name__
    assert name in _ADAPTERS, f"unknown DeepSpeed optimizer {name}"
    return _ADAPTERS[name](deepspeed_engine, grid, max_norm)


def _sum_of_squares(gradients: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of squares of all values of gradients on a device: a float64 scalar, 0 for no gradients.

    dtype: in which the values of one gradient are added up; the gradients are added up in float64.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients, 2, dtype)  # on a GPU few kernels for all of them
    return torch.stack(norms).double().square().sum()


def _allocated(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: Tensor, steps: int) -> dict[str, Any]:
    """The torch optimizer's state of a tensor that it steps on, allocated as torch's AdamW would, with `steps` done."""
    own: dict[str, Any] = optimizer.state[tensor]
    for name in MOMENTS:
        if name not in own:
            own[name] = torch.zeros_like(tensor)
    if "step" in group:  # apex counts once per group
        group["step"] = steps
    else:
        device = tensor.device if group.get("fused") or group.get("capturable") else "cpu"
        own["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)
    return own


def _set_moments(optimizer: torch.optim.Optimizer, tensor: Tensor, state: ParameterState) -> None:
    """Set the torch optimizer's moments and step count of a tensor that it steps on as a whole."""
    group = next(group for group in optimizer.param_groups if any(tensor is other for other in group["params"]))
    own = _allocated(optimizer, group, tensor, state.steps)
    for name in MOMENTS:
        own[name].copy_(state.values[name])

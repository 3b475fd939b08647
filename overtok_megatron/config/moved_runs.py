"""Finds the files that a run's configuration names after the run was moved, renamed, or is used from another folder.

Relative paths in a user's configuration start from the current folder. For an existing run, a relative path that is not found
from there starts from the folder in which the run was trained, which follows from its output_directory and from where it lies
now. A file that lay in the run's folder is looked for in that folder, wherever it is. No file's content is read.
"""

from collections.abc import Callable, Iterator
from os.path import normpath
from pathlib import Path

from overtok_megatron.config.loading import COMMAND_LINE, LoadedConfig
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.run_folder import CHECKPOINTS, CONFIG, RunFolder

_SET_FILES = (".json", ".idx", ".bin")


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint's folder belongs to; None where it lies alone."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS else None


def candidate_paths(path: str, config: RunConfig, run: Path | None) -> Iterator[Path]:
    """Paths at which the file `path` of a run's configuration may lie now, the likeliest first. run: its folder, if known."""
    yield Path(path)
    if run is None:
        return
    recorded, run = Path(normpath(config.training.output_directory)), run.resolve()
    if Path(normpath(path)).is_relative_to(recorded):  # it lay in the run's folder
        yield run / Path(normpath(path)).relative_to(recorded)
    depth = len(recorded.parts)
    same = run.parent.parts[len(run.parts) - depth :] == recorded.parts[:-1]  # at most the run's own name has changed
    if not Path(path).is_absolute() and not recorded.is_absolute() and same and ".." not in recorded.parts:
        yield Path(*run.parts[: len(run.parts) - depth]) / path


def set_exists(prefix: Path) -> bool:
    """Whether any file of a prepared set is there; opening it says which is missing."""
    return any(Path(f"{prefix}{suffix}").is_file() for suffix in _SET_FILES)


def with_current_paths(config: RunConfig, run: Path | None) -> RunConfig:
    """A run's configuration with the current paths of its datasets and its initial checkpoint; what is not found stays."""

    def find(path: str, exists: Callable[[Path], bool] = set_exists) -> str:
        return next((str(one) for one in candidate_paths(path, config, run) if exists(one)), path)

    data, initial = config.data, config.training.initial_checkpoint
    train = (
        find(data.train)
        if isinstance(data.train, str)
        else [one.model_copy(update={"path": find(one.path)}) for one in data.train]
    )
    given = data.validation
    validation = {name: find(prefix) for name, prefix in given.items()} if isinstance(given, dict) else given
    sets = {"train": train, "validation": find(validation) if isinstance(validation, str) else validation}
    start = {"initial_checkpoint": None if initial is None else find(initial, Path.exists)}
    return config.model_copy(
        update={"data": data.model_copy(update=sets), "training": config.training.model_copy(update=start)}
    )


def find_moved_run(loaded: LoadedConfig, path: Path) -> Path | None:
    """The folder of the run whose own resolved configuration is `path`, where its output_directory no longer names that folder.

    None for any other configuration, and where the command line names an output folder.
    """
    folder = path.parent.resolve()
    key = "training.output_directory"
    if path.name != CONFIG or not RunFolder(folder).checkpoints.is_dir() or loaded.locate(key) == COMMAND_LINE:
        return None
    if not loaded.locate(key).startswith(f"{path}:"):  # a configuration of a user's that inherits from the run's
        return None
    return None if Path(loaded.config.training.output_directory).resolve() == folder else folder


def relocate(loaded: LoadedConfig, run: Path) -> LoadedConfig:
    """The configuration of a run that lies in the folder `run` now, with the current paths of everything that it names."""
    config = with_current_paths(loaded.config, run)
    training = config.training.model_copy(update={"output_directory": str(run)})
    return LoadedConfig(config.model_copy(update={"training": training}), loaded.provenance)

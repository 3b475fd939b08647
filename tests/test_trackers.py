"""What TensorBoard shows of a run that was interrupted and resumed."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from overtok_megatron.config.schema import LoggingConfig
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.trackers import training_trackers


def write_steps(run: RunFolder, steps_done: int, steps: range, loss: float) -> None:
    (board,) = training_trackers(LoggingConfig(tensorboard=True), run, steps_done)
    for step in steps:
        board.write(step, {"train/loss": loss})
    board.close()


def test_a_resumed_run_shows_every_step_once(tmp_path: Path) -> None:
    """The steps behind the checkpoint are hidden, that of the checkpoint is not."""
    run = RunFolder(tmp_path)
    write_steps(run, 0, range(1, 6), loss=1.0)
    write_steps(run, 3, range(4, 8), loss=2.0)  # the last checkpoint was of step 3
    events = EventAccumulator(str(run.tensorboard)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2)]

"""Arguments of verbs that load a trained model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overtok_megatron.inference.loading import TrainedModel


def add_model(verb: argparse.ArgumentParser) -> None:
    """The run, and where its tables lie."""
    verb.add_argument("run", help="a run's output folder, or one of its checkpoints")
    verb.add_argument(
        "--storage",
        choices=("device", "host", "mapped"),
        default="device",
        help="n-gram tables beside the model, in host memory, or left on disk (memory then does not depend on their size)",
    )
    verb.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def load_model(options: argparse.Namespace, run: Path | None = None) -> "TrainedModel":
    """The model that those arguments name, or that of `run`, on the device that they name, or a GPU where there is one."""
    from overtok_megatron.inference.loading import load_trained
    from overtok_megatron.parallel.devices import default_device, named_device

    device = default_device() if options.device is None else named_device(options.device, "--device")
    return load_trained(run or Path(options.run), device, options.storage)

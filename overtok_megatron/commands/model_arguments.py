"""Arguments of the verbs that load a trained model, and what they name."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from overtok_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from overtok_megatron.config.schema import RunConfig, TokenizerConfig
    from overtok_megatron.inference.loading import TrainedModel
    from overtok_megatron.inference.speculation import Speculation


def add_model(verb: argparse.ArgumentParser) -> None:
    """Arguments for the run, the device, and where the n-gram tables are kept."""
    verb.add_argument("run", help="a run's output folder, or one of its checkpoints")
    add_tokenizer(verb)
    verb.add_argument(
        "--storage",
        choices=("device", "host", "mapped"),
        default="device",
        help="n-gram tables beside the model, in host memory, or left on disk (memory then does not depend on their size)",
    )
    verb.add_argument(
        "--device", default=None, help="cpu, cuda or cuda:N (default: the first GPU, or the CPU where there is none)"
    )


def add_tokenizer(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer",
        default=None,
        help="file of the run's tokenizer (default: the copy in the run's folder, or where it was in training)",
    )


def tokenizer_of(options: argparse.Namespace) -> Path | None:
    """The file that --tokenizer names."""
    return None if options.tokenizer is None else Path(options.tokenizer)


def carried_tokenizer(
    config: "RunConfig", run: Path | None, fingerprint: str, given: Path | None = None
) -> "tuple[TokenizerConfig | None, str]":
    """The tokenizer for a run that is made from another one, as `find_tokenizer`, and ""; or None and the reason why there is
    none."""
    from overtok_megatron.data.tokenizers.kept import find_tokenizer

    try:
        return find_tokenizer(config, run, fingerprint, given), ""
    except CheckpointError as error:
        if given is not None:
            raise
        return None, str(error)


def carry_tokenizer(section: "TokenizerConfig | None", reason: str, output: Path) -> None:
    """Put what `carried_tokenizer` found into the new run's folder, or warn that there is none."""
    from overtok_megatron.data.tokenizers.kept import keep_tokenizer

    if section is None:
        print(f"warning: {output} holds no tokenizer: {reason}", file=sys.stderr)
    else:
        keep_tokenizer(section, output)


def load_model(options: argparse.Namespace, run: Path | None = None) -> "TrainedModel":
    """The model of `run`, or else of the run that the arguments name, on the device that they name (default: a GPU if any)."""
    from overtok_megatron.inference.loading import load_trained
    from overtok_megatron.parallel.devices import default_device, named_device

    device = default_device() if options.device is None else named_device(options.device, "--device")
    return load_trained(run or Path(options.run), device, options.storage, tokenizer_path=tokenizer_of(options))


def add_speculative(verb: argparse.ArgumentParser) -> None:
    """Add the option that decodes texts by drafts."""
    verb.add_argument(
        "--speculative",
        action="store_true",
        help="decode faster: the model's heads (over_decoding, multi_token_prediction) draft tokens, and one pass verifies "
        "them; greedy texts stay the same, sampled texts keep their distribution",
    )


def speculation_of(options: argparse.Namespace, trained: "TrainedModel") -> "Speculation | None":
    """How drafts are made where --speculative is given, else None. Raises InputError where the model has no heads for them."""
    from overtok_megatron.inference.head_proposers import head_speculation

    return head_speculation(trained) if options.speculative else None

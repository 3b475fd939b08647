"""From a started process to a checked configuration and a device: what all ranks do before the trainer is made."""

import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overtok_megatron.config.loading import LoadedConfig
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.environment import ACCELERATOR, make_deterministic, usable_devices
from overtok_megatron.errors import ConfigError, OvertokError
from overtok_megatron.launching.batch_systems import find_placement
from overtok_megatron.launching.local import free_port
from overtok_megatron.launching.preparation import check_inputs, load_run, make_folder, store_inputs
from overtok_megatron.placement import Placement
from overtok_megatron.run_lock import hold
from overtok_megatron.training.meeting import Meeting
from overtok_megatron.training.same_everywhere import Facts, differences, facts_of, token_of_start

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Start:
    """What a rank needs to train. warnings: lines of the first rank on what differs between hosts and may."""

    config: RunConfig
    device: "torch.device"
    warnings: Sequence[str]


def place_process(environment: MutableMapping[str, str]) -> Placement:
    """Find which rank this is, and set the variables that torch and DeepSpeed read. Raises ConfigError."""
    place = find_placement(environment)
    environment.update(place.variables())
    if place.master_port == 0:
        environment["MASTER_PORT"] = str(free_port())
    return place


def choose_device(environment: MutableMapping[str, str], local_rank: int) -> "torch.device":
    """The device of this rank, made the current one of this thread. Raises ConfigError where there are too few.

    DeepSpeed takes the device whose number is in LOCAL_RANK, also where a batch system shows each rank just one device.
    """
    from overtok_megatron.parallel.devices import CPU, local_device, num_accelerators

    device = CPU
    if usable_devices(environment, num_accelerators()):
        device = local_device(local_rank)
        environment["LOCAL_RANK"] = str(device.index)
    environment[ACCELERATOR] = device.type  # where it is not set, DeepSpeed looks by itself, and warns
    return device


def prepare_rank(
    meeting: Meeting,
    environment: MutableMapping[str, str],
    path: str,
    overrides: Sequence[str],
    *,
    stored: bool,
    joined: Callable[[], None],
) -> Start:
    """Read the configuration, check and store it on the first rank, and return once all ranks see the same.

    stored: whether `path` was checked and stored before the ranks were started. joined: called when all ranks have come: until
    then a signal should end the process at once, because torch waits without returning to Python. Raises OvertokError on the
    rank that tells the user of a mistake, AlreadySaidError on the others, and NotMetError where ranks are missing.
    """
    place, mistake = meeting.place, None
    try:
        loaded = load_run(path, overrides, lambda line: print(line, file=sys.stderr) if meeting.is_first else None)
        if loaded.config.training.deterministic:
            make_deterministic(environment)
        device = choose_device(environment, place.local_rank)
    except OvertokError as error:
        mistake = error
    meeting.join()
    joined()
    if meeting.is_first:
        if mistake is not None:
            raise mistake
        if not stored:
            _check_and_store(loaded, place, environment)
        return Start(loaded.config, device, _compare(meeting, loaded.config, device))
    told = meeting.wait_for_beginning()
    if mistake is None:
        facts = _facts(meeting, loaded.config, device, told["config"], told["token"])
    else:
        facts = Facts(rank=place.rank, mistakes=mistake.lines)
    meeting.answer(facts.as_json())
    assert mistake is None, "the first rank has passed a mistake"
    return Start(loaded.config, device, [])


def _check_and_store(loaded: LoadedConfig, place: Placement, environment: MutableMapping[str, str]) -> None:
    from overtok_megatron.parallel.devices import num_accelerators

    validate(loaded.config, place.world_size, loaded.locate)
    devices = usable_devices(environment, num_accelerators())
    check_inputs(loaded, world_size=place.world_size, ranks_of_host=place.ranks_of_host, devices=devices)
    directory = make_folder(loaded.config)
    with hold(directory, "the first rank of a training"):
        store_inputs(loaded.config, directory)


def _compare(meeting: Meeting, config: RunConfig, device: "torch.device") -> list[str]:
    """On the first rank: hear all others. Returns warnings; raises ConfigError, a line for each thing that differs."""
    values = config.model_dump(mode="json")
    with token_of_start(Path(config.training.output_directory)) as token:
        meeting.begin({"config": values, "token": token})
        own = _facts(meeting, config, device, values, token)
        mistakes, warnings = differences([own, *(Facts(**answer) for answer in meeting.answers())])
    if mistakes:
        raise ConfigError(*mistakes)
    meeting.go_on()
    return warnings


def _facts(meeting: Meeting, config: RunConfig, device: "torch.device", first: dict[str, object], token: str) -> Facts:
    from overtok_megatron.parallel.devices import identity

    return facts_of(
        config, meeting.place.rank, first=first, token=token, device_type=device.type, device=identity(device)
    )

"""What every rank must see as the first one does, found out before the process group is made, and the lines on what differs.

Compared are the configuration, the datasets and the tokenizer, the versions of what computes, the kind of device, and the
output folder: the first rank writes a token there, which all must read. One small object travels per rank.
"""

import hashlib
import json
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import overtok_megatron
from overtok_megatron.config.derived import validation_sets
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.manifest import dataset_paths
from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.shared_folder import sees_token, token_in

_CONFIGURATION, _FOLDER = "the configuration", "training.output_directory"
_AS_FIRST = "as on the first rank"
_MENDS = {
    _CONFIGURATION: "start all ranks with the same file and the same overrides",
    _FOLDER: "name a folder that all hosts share",
    "device": "ask for the same devices on every host, or set DS_ACCELERATOR=cpu on all of them",
}
_INSTALL, _SHARE = "install the same on every host", "let every host see the same files"
_WARNED = "numpy"  # shuffles and batches are made of integers, which no release has changed


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What one rank sees. values: by name, compared with those of the first rank. mistakes: lines of its own.

    device: which one it computes on, by its UUID; None for a CPU.
    """

    rank: int
    host: str = field(default_factory=socket.gethostname)
    values: dict[str, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    device: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def where(self) -> str:
        return f"{self.host} (rank {self.rank})"


def facts_of(
    config: RunConfig, rank: int, *, first: dict[str, Any], token: str, device_type: str, device: str | None
) -> Facts:
    """What this rank sees.

    first: the first rank's configuration, as `model_dump` in the mode of JSON gives it. token: what the first rank wrote into
    the output folder.
    """
    folder = config.training.output_directory
    values = {
        _CONFIGURATION: _difference(first, config.model_dump(mode="json")) or _AS_FIRST,
        _FOLDER: _AS_FIRST if sees_token(Path(folder), token) else f"{folder} is another folder",
        **_data(config),
        **_versions(),
        "device": device_type,
    }
    return Facts(rank=rank, values=values, device=device)


def differences(facts: Sequence[Facts]) -> tuple[list[str], list[str]]:
    """(mistakes, warnings), a line for each thing that ranks see otherwise than the first of `facts`, naming the hosts.

    facts: of all ranks, in their order.
    """
    first, mistakes, warnings = facts[0], list[str](), list[str]()
    for line, ranks in _by_text({one: line for one in facts for line in one.mistakes[:1]}):
        mistakes.append(f"{_hosts(ranks)}: {line}")
    answered = [one for one in facts if not one.mistakes]
    for name, expected in first.values.items():
        for value, ranks in _by_text({one: one.values.get(name, "unknown") for one in answered}):
            if value == expected:
                continue
            told = f"; on {first.where} {expected}" if expected != _AS_FIRST else ""
            mend = _MENDS.get(name, _SHARE if name.startswith(("data.", "tokenizer")) else _INSTALL)
            (warnings if name == _WARNED else mistakes).append(f"{name}: {value} on {_hosts(ranks)}{told}; {mend}")
    mistakes += _shared_devices(answered)
    return mistakes, warnings


@contextmanager
def token_of_start(folder: Path) -> Iterator[str]:
    """On the first rank: a token in the run's folder while the block runs. Raises ConfigError where it cannot be written."""
    with ExitStack() as stack:
        try:
            token = stack.enter_context(token_in(folder))
        except OSError as error:
            raise ConfigError(f"{_FOLDER}: {folder}: cannot be written ({error.strerror})") from None
        yield token


def _difference(first: dict[str, Any], own: dict[str, Any]) -> str:
    """The first key whose value differs, with both values; empty where none does."""
    for section, values in first.items():
        for name, value in values.items():
            mine = own.get(section, {}).get(name)
            if json.dumps(mine, sort_keys=True) != json.dumps(value, sort_keys=True):
                return f"{section}.{name} is {_short(mine)}, and {_short(value)} on the first rank,"
    return ""


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _data(config: RunConfig) -> dict[str, str]:
    """The datasets and the tokenizer, each by its key and path."""
    train = config.data.train
    sets = [("data.train", train)] if isinstance(train, str) else [("data.train", one.path) for one in train]
    sets += [("data.validation", prefix) for prefix in validation_sets(config).values()]
    found = {f"{key} {prefix}": _dataset(prefix) for key, prefix in sets}
    if config.tokenizer.path is not None:
        path = Path(config.tokenizer.path)
        found[f"tokenizer.path {path}"] = (
            _digest(path) if path.is_file() else "a folder" if path.is_dir() else "missing"
        )
    return found


def _dataset(prefix: str) -> str:
    """The digest of a set's manifest, which holds those of its other two files, and their sizes."""
    tokens, index, manifest = dataset_paths(prefix)
    for path in (manifest, tokens, index):
        if not path.is_file():
            return f"{path.name} is missing"
    try:
        return f"{_digest(manifest)} with {tokens.stat().st_size:,} + {index.stat().st_size:,} bytes"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _digest(path: Path) -> str:
    return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "deepspeed", _WARNED)}
    return {"overtok_megatron": overtok_megatron.__version__, "python": platform.python_version(), **packages}


def _by_text(texts: dict[Facts, str]) -> list[tuple[str, list[Facts]]]:
    """The different texts with the ranks that say them, in the order of the first of those."""
    found: dict[str, list[Facts]] = {}
    for one, text in texts.items():
        found.setdefault(text, []).append(one)
    return list(found.items())


def _hosts(ranks: list[Facts]) -> str:
    """The first host, and how many more there are."""
    others = len({one.host for one in ranks}) - 1
    return ranks[0].where + (f" and {others} more {'host' if others == 1 else 'hosts'}" if others else "")


def _shared_devices(facts: Sequence[Facts]) -> list[str]:
    """A line where two ranks of a host would compute on one device: nccl hangs or refuses it in words of its own."""
    owners: dict[tuple[str, str], Facts] = {}
    for one in facts:
        if one.device is None:
            continue
        other = owners.setdefault((one.host, one.device), one)
        if other is not one:
            return [
                f"ranks {other.rank} and {one.rank} of {one.host} see one GPU, {one.device}; let each task see one of "
                "its own, or all of them"
            ]
    return []

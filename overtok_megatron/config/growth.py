"""The configuration of a model that gets more n-gram tables, or heads for later tokens.

Pure; the weights are the work of checkpoint/growing.py.
"""

import re
from collections.abc import Sequence

from overtok_megatron.config.derived import has_word_embedding
from overtok_megatron.config.model_keys import MODEL_KEYS
from overtok_megatron.config.schema import LONGEST_ORDER, AddedTables, OverEncodingConfig, RunConfig
from overtok_megatron.config.section import FURTHEST, LARGEST, MOST_PARTS
from overtok_megatron.config.wording import line, short
from overtok_megatron.errors import ConfigError

_FORM = "orders=2-3,slices=2,rows=1053639"
_NAMES = ("orders", "slices", "rows")


def parse_tables(text: str) -> AddedTables:
    """`orders=2-3,slices=2,rows=M`: tables of these n-gram lengths (one number, or first-last). Raises ConfigError."""
    values: dict[str, str] = {}
    parts, text = text.split(","), short(text)
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = "orders" if name == "order" else name
        if not equals or name not in _NAMES or name in values:
            raise ConfigError(
                line(
                    "--tables",
                    f"{text}; {short(repr(part))} is none of {', '.join(_NAMES)}, or comes twice; write {_FORM}",
                )
            )
        values[name] = value
    for name in ("orders", "rows"):
        if name not in values:
            raise ConfigError(line("--tables", f"{text}; gives no {name}; write {_FORM}"))
    span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", values["orders"])
    orders = list(range(int(span[1]), int(span[2] or span[1]) + 1)) if span else []
    if not orders or orders[0] < 2 or orders[-1] > LONGEST_ORDER:
        raise ConfigError(
            line(
                "--tables",
                f"{text}; orders must be a number from 2 on, or a range of them, as 2-3; {LONGEST_ORDER} is the most",
            )
        )
    numbers = {name: values.get(name, "1").replace("_", "") for name in ("slices", "rows")}
    for (name, number), most in zip(numbers.items(), (MOST_PARTS, LARGEST), strict=True):
        if not number.isdecimal() or len(number) > 10 or not 1 <= int(number) <= most:
            raise ConfigError(line("--tables", f"{text}; {name} must be a whole number from 1 to {most}"))
    return AddedTables(orders=orders, num_slices=int(numbers["slices"]), table_rows=int(numbers["rows"]))


def grow_config(
    config: RunConfig, tables: Sequence[AddedTables], *, freeze: bool, multi_token_depth: int | None = None
) -> RunConfig:
    """The configuration of a model with `tables` beside those that it has, the old ones frozen where `freeze`.

    A plain model gets the first of them as its base. multi_token_depth: how many depths of multi-token prediction it has then;
    None = as many as now. Raises ConfigError where the tables cannot be that, where nothing can be frozen, and where nothing
    grows.
    """
    if multi_token_depth is not None:
        config = _with_depth(config, multi_token_depth)
    elif not tables:
        raise ConfigError("overtok grow: nothing to add; give --tables, --multi-token-prediction, or both")
    if not tables:
        if freeze:
            raise ConfigError(
                "--freeze: freezes old tables when new ones are added; write --tables as well, or leave it out"
            )
        return config
    over = config.over_encoding
    if over.enabled:
        old = [group.model_copy(update={"frozen": group.frozen or freeze}) for group in over.added]
        changes = {"added": [*old, *tables], "frozen": over.frozen or freeze}
    else:
        changes = {"added": list(tables[1:]), **_base(tables[0], freeze)}
    return config.model_copy(update={"over_encoding": over.model_copy(update=changes)})


def _with_depth(config: RunConfig, depth: int) -> RunConfig:
    section = config.multi_token_prediction
    if not section.depth < depth <= FURTHEST:
        has = f"the model has {section.depth} already; " if section.depth else ""
        reason = f"{has}write a number from {section.depth + 1} to {FURTHEST}"
        raise ConfigError(line("--multi-token-prediction", f"{depth}; {reason}"))
    return config.model_copy(update={"multi_token_prediction": section.model_copy(update={"depth": depth})})


def _base(first: AddedTables, freeze: bool) -> dict[str, object]:
    longest = first.orders[-1]
    if freeze:
        raise ConfigError("--freeze: the model has no n-gram tables that could be frozen; leave it out")
    if first.orders != list(range(2, longest + 1)):
        raise ConfigError(
            f"--tables: orders {first.orders[0]}-{longest}; the first tables of a plain model begin at 2-grams; "
            f"write orders=2-{longest}, or name such tables before these"
        )
    rows = {"ngram_order": longest, "num_slices": first.num_slices, "table_rows": first.table_rows}
    return {"enabled": True, "frozen": False, **rows}


def check_grown(old: RunConfig, new: RunConfig) -> None:
    """Raise ConfigError naming the first key by which `new` computes other logits than `old` while added rows are zero."""
    if old.model != new.model:
        raise ConfigError(
            f"model: {_difference(old.model, new.model)}; growing changes tables and heads only: leave it as it is"
        )
    if old.training.precision != new.training.precision:
        raise ConfigError(
            f"training.precision: {new.training.precision}; the model was trained in {old.training.precision}: "
            "leave it as it is"
        )
    for key in MODEL_KEYS["over_decoding"] or ():
        value, kept = (getattr(config.over_decoding, key) for config in (new, old))
        if value != kept:
            raise ConfigError(f"over_decoding.{key}: {value}; the model has {kept}, and growing does not change that")
    depths = [config.multi_token_prediction.depth for config in (old, new)]
    if depths[1] < depths[0]:
        raise ConfigError(
            f"multi_token_prediction.depth: {depths[1]}; the model has {depths[0]}, and growing removes none"
        )
    before, after = old.over_encoding, new.over_encoding
    if not before.enabled:
        if not has_word_embedding(after):
            raise ConfigError(
                "over_encoding.word_embedding: false; would take a plain model's embedding away: write true, or leave it out"
            )
        if after.enabled and after.combine == "mean":
            raise ConfigError(
                "over_encoding.combine: mean; would divide the embedding of a plain model by 1 + its tables: "
                "write over_encoding.combine=scaled, or sum"
            )
        return
    for key in MODEL_KEYS["over_encoding"] or ():
        if key not in ("enabled", "added") and getattr(before, key) != getattr(after, key):
            raise ConfigError(
                f"over_encoding.{key}: {getattr(after, key)}; the tables that are there have {getattr(before, key)}: "
                "leave it as it is"
            )
    added = [_added_shapes(over) for over in (before, after)]
    begins_alike = added[1][: len(added[0])] == added[0]
    if not begins_alike or (len(added[1]) == len(added[0]) and depths[1] == depths[0]):
        raise ConfigError("over_encoding.added: gives other tables than --tables does; leave it out")


def same_tables(old: RunConfig, new: RunConfig) -> bool:
    """Whether a grown model has the tables that it had, no more."""
    before, after = old.over_encoding, new.over_encoding
    return before.enabled == after.enabled and _added_shapes(before) == _added_shapes(after)


def _added_shapes(over: OverEncodingConfig) -> list[tuple[list[int], int, int]]:
    return [(group.orders, group.num_slices, group.table_rows) for group in over.added]


def _difference(old: object, new: object) -> str:
    return next(f"{key} {value}" for key, value in vars(new).items() if vars(old)[key] != value)

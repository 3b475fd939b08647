"""Rules about the n-gram tables: how many they are, their sizes, and how their ids collide."""

from collections.abc import Iterator
from dataclasses import dataclass

from overtok_megatron.config.collisions import LARGEST_ROWS, collision_problem
from overtok_megatron.config.derived import hash_base, table_orders
from overtok_megatron.config.nearest import nearest_divisor, number_does
from overtok_megatron.config.problems import PROCESSES, Problem, problem
from overtok_megatron.config.schema import RunConfig


@dataclass(frozen=True)
class _TableSizes:
    """The sizes rows, rows + 2, .. of `tables` tables, which `key` gives. entry: where in the key's value, for messages."""

    key: str
    entry: str
    rows: int
    tables: int

    @property
    def value(self) -> str:
        """What a message names."""
        return f"{self.entry}{self.rows}"

    @property
    def most(self) -> int:
        """The most rows of the first table with which the last one can still be hashed."""
        return LARGEST_ROWS - 2 * (self.tables - 1)


def table_problems(config: RunConfig) -> Iterator[Problem]:
    """What breaks the rules of an over_encoding section that is enabled."""
    over, model = config.over_encoding, config.model
    tables = (over.ngram_order - 1) * over.num_slices
    if over.table_rows is None:
        example = round(128.618 * model.vocab_size)
        reason = f"is needed with over_encoding.enabled: rows of a table, for example {example}"
        yield problem("over_encoding.table_rows", "none", reason)
    if over.row_width is None and model.hidden_size % tables:
        reason = (
            f"makes {tables} tables (ngram_order - 1 times num_slices), which do not divide hidden_size "
            f"{model.hidden_size}; {nearest_divisor(model.hidden_size, tables)} tables do, or give over_encoding.row_width"
        )
        yield problem("over_encoding.num_slices", over.num_slices, reason)
    if over.pad_id >= model.vocab_size:
        reason = f"is no token of a vocabulary of {model.vocab_size}; 0 to {model.vocab_size - 1} are"
        yield problem("over_encoding.pad_id", over.pad_id, reason)
    if isinstance(over.dropout, list) and len(over.dropout) != max(table_orders(over)) - 1:
        longest = max(table_orders(over))
        reason = f"has {len(over.dropout)} numbers; write {longest - 1}, one for each order from 2 to {longest}, or one for all"
        yield problem("over_encoding.dropout", over.dropout, reason)
    if model.tie_word_embeddings and not over.word_embedding:
        reason = "takes away the embedding that the head is tied to; write true, or model.tie_word_embeddings: false"
        yield problem("over_encoding.word_embedding", "false", reason, ("model.tie_word_embeddings",))
    for number, group in enumerate(over.added):
        if len(set(group.orders)) != len(group.orders):
            reason = "names an order twice; use num_slices for several tables of one order"
            yield problem("over_encoding.added", f"entry {number}, orders {group.orders}", reason)
    for sizes in _table_sizes(config):
        if sizes.rows > sizes.most:
            reason = (
                f"puts the last table at 2^31 rows or more, where hashing can overflow 64 bits; at most {sizes.most}"
            )
            yield problem(sizes.key, sizes.value, reason)
    if over.collision_check == "error":
        for sizes, text in _collisions(config):
            reason = f"{text} (over_encoding.collision_check: warn lets it pass)"
            yield problem(sizes.key, sizes.value, reason)


def collision_warnings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, what its value does) of table sizes that collide and that the configuration lets pass."""
    if config.over_encoding.enabled and config.over_encoding.collision_check == "warn":
        for sizes, text in _collisions(config):
            yield sizes.key, f"{sizes.value} {text}"


def host_group_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Whether an exchange in two levels has hosts of equally many ranks."""
    per_host = config.over_encoding.ranks_per_host or 1
    if world_size % per_host:
        better = number_does(nearest_divisor(world_size, per_host))
        reason = f"does not divide the {world_size} ranks (--processes); {better}"
        yield problem("over_encoding.ranks_per_host", per_host, reason, (PROCESSES,))


def _table_sizes(config: RunConfig) -> Iterator[_TableSizes]:
    over = config.over_encoding
    if over.table_rows is not None:
        yield _TableSizes("over_encoding.table_rows", "", over.table_rows, (over.ngram_order - 1) * over.num_slices)
    for number, group in enumerate(over.added):
        entry, tables = f"entry {number}, table_rows ", len(group.orders) * group.num_slices
        yield _TableSizes("over_encoding.added", entry, group.table_rows, tables)


def _collisions(config: RunConfig) -> Iterator[tuple[_TableSizes, str]]:
    """Sizes within bounds whose ids collide more than they must, with the reason and a way out."""
    base = hash_base(config)
    for sizes in _table_sizes(config):
        found = None if sizes.rows > sizes.most else collision_problem(sizes.rows, base, sizes.tables)
        if found is not None:
            way_out = f"{found.proposed_rows} is a good size nearby"
            if found.proposed_rows is None:
                way_out = "no size does with this base and so many tables"
            yield (
                sizes,
                f"is {found.ratio:.2f} times the hash base {base} (table {found.table}): so close to an integer that "
                f"frequent n-grams share rows; {way_out}",
            )

"""The keys that define a model: weights and rows of a model that differs in one of them are those of another model."""

# By section; None = every key of the section.
MODEL_KEYS: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "over_encoding": (
        "enabled",
        "ngram_order",
        "num_slices",
        "table_rows",
        "row_width",
        "added",
        "combine",
        "word_embedding",
        "pad_id",
        "boundary",
        "hash_base",
        "row_dtype",
    ),
}

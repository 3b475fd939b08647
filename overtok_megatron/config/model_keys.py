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
    "over_decoding": ("num_tokens", "low_rank"),
    "multi_token_prediction": ("depth",),
}

# A key by which no model of this value has the section: its other keys are then not read.
OFF: dict[str, tuple[str, object]] = {
    "over_encoding": ("enabled", False),
    "over_decoding": ("num_tokens", 1),
    "multi_token_prediction": ("depth", 0),
}

"""Pretraining of over-tokenized transformers: sharded n-gram input embeddings beside a tensor-parallel model."""

__version__ = "0.1.0"

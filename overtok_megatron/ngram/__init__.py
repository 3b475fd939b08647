"""N-gram input embeddings: token ids to table rows, the sharded tables, their exchange and their optimizer."""

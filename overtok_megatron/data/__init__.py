"""Text to tokens to batches: tokenizers, the indexed dataset on disk, the order of samples. Knows no model."""

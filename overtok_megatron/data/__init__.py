"""Text to tokens to batches: tokenizers, the indexed dataset on disk, the order of samples. Knows no model, and not torch.

Imports inside this room go one way: tokenizers/ and the indexed sets (index_file, manifest, partial_set, indexed) know
nothing else here. Both are known to preparing/, which makes sets from a corpus, and to sampler, blending, batches and run_data,
which read sets for a run; these two sides do not know each other.
"""

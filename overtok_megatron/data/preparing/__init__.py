"""From a corpus to indexed sets on disk, and to a tokenizer: everything that happens once before a run.

Knows tokenizers/ and the indexed sets, and nothing of how a run reads its samples.
"""

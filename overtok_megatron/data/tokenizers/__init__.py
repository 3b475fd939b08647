"""Tokenizers of three kinds behind one protocol, and the one that a run keeps. Knows nothing else of data/: what trains a
tokenizer reads a corpus, and is preparing/train_tokenizer.py."""

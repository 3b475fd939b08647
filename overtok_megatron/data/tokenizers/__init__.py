"""Tokenizers behind one protocol: sentencepiece models, Hugging Face's tokenizer.json, bytes."""

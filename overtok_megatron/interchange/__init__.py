"""Models and tokenizers to and from Hugging Face's formats, and the check that both give the same logits."""

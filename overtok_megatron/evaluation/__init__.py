"""Scores of trained models: perplexity of prepared sets, lm-eval's tasks, and every checkpoint of a run as it appears."""

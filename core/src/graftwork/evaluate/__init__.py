"""Scores: continual-learning metrics, paired bootstrap, generated answers, perplexity."""

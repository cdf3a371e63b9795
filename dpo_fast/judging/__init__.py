"""Scores of completions, and pairs made of them."""

"""Completions of prompts: engines that sample, and the prompts they get."""

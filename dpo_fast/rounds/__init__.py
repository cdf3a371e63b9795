"""Preference training in rounds: sample, judge, train, again. Three commands and one file."""

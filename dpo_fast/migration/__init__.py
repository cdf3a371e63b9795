"""Configurations of other trainers, turned into ours: `dpo-fast import`.

option      what a trainer's option becomes here: a table of them is a trainer's page in docs/
draft       our configuration while it is made, and what became of every option that was given
importers   the trainers, and the way from a file to a configuration
"""

"""The commands of `metaembed`, a module each: `add_flags` says what a command takes, `run` hands it to the function that does it.

A module is imported when its command is asked for, so that `metaembed search` needs nothing of training.
"""

"""The commands of `metaembed`, a module each: `add_flags` declares the flags, `run` passes them to the function of the command.

Only the module of the given command is imported, so that `metaembed search` does not need the packages of training.
"""

"""The command `fpn`, also `python -m fpn`: a module for each subcommand."""

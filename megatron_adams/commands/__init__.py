"""The subcommands of `megatron-adams`, one module each. cli.py lists them.

A subcommand's module has `add_to(commands)`, which adds its parser and sets the parser's default
`run`: a function that takes the parsed arguments and returns the exit code. No module imports
Megatron at its top.
"""

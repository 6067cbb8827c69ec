"""The commands that installation puts on the path, `ovd-…`; `tools/` calls the same functions.

Nothing slow is imported before the command line is parsed.
"""

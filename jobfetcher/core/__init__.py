"""The words everything else is written in: values, errors, phases and seams.

Imports no other room of the program and no library that does I/O (pydantic parses; it does not read or send).
"""

"""Options and commands: build a config, call one function, print the result.

May import every package, those with torch only inside a command.
"""

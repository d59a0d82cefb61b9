"""The one error that means "the user can fix this"."""


class ConfigError(ValueError):
    """Bad user input, found before any work is done.

    The message names the key, the value and what would be valid. The command-line doors print it alone, without a
    traceback, and exit with status 2.
    """

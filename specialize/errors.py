"""The one exception that means "the user gave something unusable". Every package may import this leaf."""


class InputError(ValueError):
    """Wrong input. The message is one line: what was given, what is allowed, what to do. The CLI exits with code 2."""

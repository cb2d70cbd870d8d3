"""The error that every problem with the user's data raises."""


class DataError(ValueError):
    """What is wrong with the data or its settings, on one line, with the remedy."""

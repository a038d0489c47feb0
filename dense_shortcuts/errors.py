"""The one error class of the package."""


class DenseShortcutError(ValueError):
    """Something the caller can mend: one sentence that says what is wrong and what to do.

    Whatever raises it has changed nothing. The command line prints it and exits with code 2.
    """

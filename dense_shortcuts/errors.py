"""The one error class of the package."""


class DenseShortcutError(ValueError):
    """Something the caller can mend: one sentence that says what is wrong and what to do.

    A call that refuses its arguments has changed nothing. What fails at work, such as a run whose loss is not finite or
    whose disk is full, leaves what it had made by then. The command line prints the sentence and exits with code 2.
    """

"""The one error class of the package."""


class DenseShortcutError(ValueError):
    """An error that the caller can fix: one sentence that says what is wrong and what to do.

    A call that rejects its arguments has changed nothing. One that fails later, such as a run whose loss is not finite
    or whose disk is full, leaves what it had written. The command line prints the sentence and exits with code 2.
    """

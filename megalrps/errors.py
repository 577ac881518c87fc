"""The one exception that means "the user handed us something wrong"."""


class InputError(ValueError):
    """A mistake in a flag, a file or an environment that only the user can mend.

    The message names the flag or the file and says what to do about it. Entry points print it as one line on
    standard error and exit with status 2 (:data:`EXIT_INPUT_ERROR`), before any accelerator time is spent; every other
    exception is a defect of ours and keeps its traceback.
    """


class RepeatedError(InputError):
    """The user's mistake that another rank reports: this one ends with the same status and says nothing."""


EXIT_INPUT_ERROR = 2

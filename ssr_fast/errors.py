"""The one exception for a user's mistake. It stands below every other room and imports nothing."""


class UserError(Exception):
    """A user's mistake: one sentence that says what is wrong, where (file, option, value) and what to do.

    Entry points print it as `error: <sentence>` on stderr and exit with code 2, without a traceback.
    """

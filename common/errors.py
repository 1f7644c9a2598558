"""`InputError`, raised for errors that the user can fix; programs print it and exit with code 2."""


class InputError(Exception):
    """Bad input, an unusable file or an impossible request; the message is one sentence.

    Programs print the message to the user.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, and what had to be saved is saved; the program exits with 143."""

"""The one exception that means "the user can mend this": programs print it as a sentence and exit
with code 2."""


class InputError(Exception):
    """Bad input, a bad file or an impossible request; the message is one clear sentence for the
    user."""

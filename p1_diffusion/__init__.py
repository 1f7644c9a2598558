"""Problem 1: conditional diffusion of digits."""

import common  # noqa: F401  (no traceback on Ctrl-C while a program is being imported)

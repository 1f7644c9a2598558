"""Problem 2: DDIM sampling of faces."""

import common  # noqa: F401  (no traceback on Ctrl-C while a program is being imported)

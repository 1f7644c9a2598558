"""Problem 3 of 2024: zero-shot classification by CLIP, and personalisation."""

import common  # noqa: F401  (no traceback on Ctrl-C while a program is being imported)

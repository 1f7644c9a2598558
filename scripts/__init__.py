"""Programs beside the problems: data, reports, benchmarks."""

import common  # noqa: F401  (no traceback on Ctrl-C while a program is being imported)

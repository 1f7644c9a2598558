"""Problem 3 of 2025: ControlNet, and the small latent-diffusion model."""

import common  # noqa: F401  (no traceback on Ctrl-C while a program is being imported)

"""Latent diffusion: models, control by a ControlNet, and generating pictures."""

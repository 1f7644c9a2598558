"""Code that all problems share: diffusion, training loop, data, images and metrics.

Imports no problem folder.
"""

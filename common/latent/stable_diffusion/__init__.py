"""Stable Diffusion v1.4: its configurations (`sd14.py`) and loading its weights (`load.py`)."""

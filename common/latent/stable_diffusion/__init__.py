"""Stable Diffusion v1.4: what it is (`sd14.py`), and its networks from the files that are in
circulation (`files.py`)."""

"""Datasets in the homework's layouts, drawn scenes, and the held-out split."""

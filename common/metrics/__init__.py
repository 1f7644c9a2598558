"""Metrics and classifiers, from pixels or features to numbers."""

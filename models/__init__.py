"""SBKA itself: networks, alignment, training and the zero-shot test."""

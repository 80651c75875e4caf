"""SBKA itself: networks, losses, training and the zero-shot test."""

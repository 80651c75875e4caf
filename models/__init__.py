"""SBKA itself: networks, alignment, training and the zero-shot test."""

from models import sort_kernel

sort_kernel.choose()  # here, since nothing of this package imports NumPy earlier

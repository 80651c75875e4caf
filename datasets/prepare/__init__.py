"""What makes, checks and shows a benchmark folder: `python -m datasets.prepare`, see `__main__`."""

"""What SBKA sees: the benchmarks, their lists, images and loaders."""

"""The benchmarks: protocols, lists, images and data loaders."""

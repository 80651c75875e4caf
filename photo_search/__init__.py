"""Search in folders of photos with a sketch: photos, the index on disk, exact search by cells."""

"""Data: labels, layouts, the index, the plan of samples, geometry, loaders."""

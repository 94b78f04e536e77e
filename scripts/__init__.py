"""Scripts that make what the package ships: the nano model and the datasets."""

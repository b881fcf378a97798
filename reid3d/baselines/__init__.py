"""Strong 2D methods, from the pixels of a crop, under the same data, training and evaluation as the 3D networks."""

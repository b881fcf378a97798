"""From crops to clouds: the body, its fit, the RGB-to-vertex mapping, batch conversion, synthetic people."""

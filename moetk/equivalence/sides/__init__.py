"""One kind of implementation each, cut into stages."""

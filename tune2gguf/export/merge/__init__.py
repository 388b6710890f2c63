"""Base and adapter become one: the arithmetic, and the weights that it reads slab by slab."""

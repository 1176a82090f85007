"""The algebra: what a layer is, what an update does to its weight, and which form is cheaper."""

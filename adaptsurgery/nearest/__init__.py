"""The nearest adapter to a difference: goals, Lanczos, Procrustes, Kronecker and Hadamard products."""

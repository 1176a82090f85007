"""A file becomes named modules and updates, and the way back."""

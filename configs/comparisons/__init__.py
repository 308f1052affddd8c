"""Comparisons: one typed Python file each, whose docstring is a lab note and whose `comparison()` returns it."""

"""Samples by the hundred thousand, each drawn exactly once, in files that other libraries read."""

"""Samples by the hundred thousand, each exactly once."""

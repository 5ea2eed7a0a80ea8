"""Samplers: models, requests, graphs and what runs them. Imports nothing by itself: the command line starts without torch."""

"""Predictors learned from a teacher's trajectories: fitted, distilled, and schedules searched. Imports nothing by itself."""

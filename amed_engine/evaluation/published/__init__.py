"""Published evaluations as recipes, and what it takes to measure them again."""

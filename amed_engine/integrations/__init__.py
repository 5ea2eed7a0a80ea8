"""The engine in the shapes of other stacks. Each module needs its stack only when it is imported, this package none."""

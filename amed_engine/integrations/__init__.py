"""Adapters of other stacks; each module needs what it adapts, and nothing here imports one by itself."""

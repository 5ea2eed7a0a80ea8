"""Programs for other stacks: packages, ONNX, tables of numbers. Imports nothing by itself: `Stepper` starts without torch."""

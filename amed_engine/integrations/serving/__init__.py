"""Examples that run: the engine behind NVIDIA's Triton Inference Server, LitServe and Ray Serve."""

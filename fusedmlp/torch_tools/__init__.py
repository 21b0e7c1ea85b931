"""Helpers around PyTorch itself; none of them knows the fused layers."""

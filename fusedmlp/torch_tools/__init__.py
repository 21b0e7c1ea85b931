"""Helpers around PyTorch itself: nothing here knows of fused layers."""

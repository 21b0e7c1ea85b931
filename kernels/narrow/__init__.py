"""A chain of narrow layers in one launch: a program takes some rows of x through all layers.

h[0] = x;  h[i + 1] = relu(h[i] @ weight[i].T + bias[i])
"""

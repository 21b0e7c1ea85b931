"""A chain of narrow layers (at most 8, up to 256 wide): one launch for the forward, one for the backward.

x = h[0] ``(M, K)``; layer i has weight[i] ``(N, K)``, bias[i] ``(N,)`` and the output h[i + 1] ``(M, N)``.

    h[i + 1]       = relu(h[i] @ weight[i].T + bias[i])              forward.py
    grad_z[i - 1]  = grad_z[i] @ weight[i] where h[i] > 0, else 0    backward.py, with grad_x and grad_bias
    grad_weight[i] = grad_z[i].T @ h[i]                              layer/grad_weight.py, in one more launch

Each program takes a block of rows through all layers, so no launch is needed between layers. The function
``_plan`` in each file decides, by a measurement or else by a rule, whether that is faster than one launch for
each layer.
"""

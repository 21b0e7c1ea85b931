"""One layer: ``y = relu(x @ weight.T + bias)`` and its gradients, one launch for each product.

x ``(M, K)``, weight ``(N, K)``, bias ``(N,)``, y and grad_y ``(M, N)``; without a ReLU, ``grad_z = grad_y``.

    y           = relu(x @ weight.T + bias)    (M, N)  forward.py
    grad_z      = grad_y where y > 0, else 0   (M, N)  grad_input.py of the layer above, or relu_backward.py
    grad_x      = grad_z @ weight              (M, K)  grad_input.py
    grad_weight = grad_z.T @ x                 (N, K)  grad_weight.py, several layers in one launch
    grad_bias   = grad_z.sum(0)                (N,)    in the kernel that computes grad_z, or grad_weight.py

Sums are float32 and rounded once. Where a sum over rows is computed in parts, partial_sums.py adds the parts.
"""

"""One layer: ``y = relu(x @ weight.T + bias)`` and its gradients.

With x ``(M, K)``, weight ``(N, K)``, bias ``(N,)``, y and grad_y ``(M, N)``:

    grad_z      = grad_y where y > 0, else 0   relu_backward.py
    grad_x      = grad_z @ weight              grad_input.py
    grad_weight = grad_z.T @ x                 grad_weight.py
    grad_bias   = sum of grad_z over the rows  beside the kernel that computes or reads grad_z
"""

"""A whole training step of an MLP: one launch over rows, then one over weights.

x = h[0] ``(rows, K)``; layer i of L has weight W[i] ``(N, K)``, bias b[i] ``(N,)`` and the output h[i + 1].

    rows.py        h[i + 1] = relu(h[i] @ W[i].T + b[i]), for the last layer z, without ReLU
                   loss = the mean of cross_entropy(z, target) or of (z - target)**2
                   g[L - 1] = softmax(z) - one_hot(target), or z - target
                   g[i - 1] = g[i] @ W[i] where h[i] > 0, else 0
    weights.py     grad_W[i] = c * g[i].T @ h[i],   grad_b[i] = c * g[i].sum(0)
                   c = 1 / counted labels, or 2 / elements of z
    optimizers.py  W[i] and b[i] by SGD, Adam or AdamW, as torch.optim defines them

The second phase needs the results of all programs of the first: step.py launches one after the other;
persistent.py does many steps in one launch, with a barrier of all programs after each phase. Widths are at
most 256, except x's. Parameters and the optimizer's state are float32; products are float32, TF32, float16 or
bfloat16. A step allocates nothing and does not wait for the device, so a CUDA graph can hold it.
"""

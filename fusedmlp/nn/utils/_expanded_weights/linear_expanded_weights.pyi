from torch.nn.utils._expanded_weights.linear_expanded_weights import *

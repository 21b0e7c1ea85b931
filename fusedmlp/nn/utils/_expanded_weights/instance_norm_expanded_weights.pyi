from torch.nn.utils._expanded_weights.instance_norm_expanded_weights import *

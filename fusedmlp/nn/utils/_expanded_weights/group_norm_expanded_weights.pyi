from torch.nn.utils._expanded_weights.group_norm_expanded_weights import *

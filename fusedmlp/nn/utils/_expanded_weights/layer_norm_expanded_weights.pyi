from torch.nn.utils._expanded_weights.layer_norm_expanded_weights import *

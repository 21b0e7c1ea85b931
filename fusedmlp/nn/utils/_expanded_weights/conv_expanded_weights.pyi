from torch.nn.utils._expanded_weights.conv_expanded_weights import *

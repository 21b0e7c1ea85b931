from torch.nn.utils._expanded_weights.conv_utils import *

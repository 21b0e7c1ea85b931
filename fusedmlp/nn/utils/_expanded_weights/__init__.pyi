from torch.nn.utils._expanded_weights import *

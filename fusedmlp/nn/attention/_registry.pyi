from torch.nn.attention._registry import *

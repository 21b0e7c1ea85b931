from torch.nn.attention._utils import *

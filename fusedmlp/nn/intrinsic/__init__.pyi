from torch.nn.intrinsic import *

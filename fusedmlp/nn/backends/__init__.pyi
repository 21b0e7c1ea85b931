from torch.nn.backends import *

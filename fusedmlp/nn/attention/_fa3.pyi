from torch.nn.attention._fa3 import *

from torch.nn.attention._fa4 import *

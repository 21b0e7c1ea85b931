from torch.nn.utils.init import *

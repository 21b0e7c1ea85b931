from torch.nn.intrinsic.modules import *

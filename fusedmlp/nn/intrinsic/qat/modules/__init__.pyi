from torch.nn.intrinsic.qat.modules import *

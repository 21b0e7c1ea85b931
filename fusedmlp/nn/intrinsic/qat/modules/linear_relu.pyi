from torch.nn.intrinsic.qat.modules.linear_relu import *

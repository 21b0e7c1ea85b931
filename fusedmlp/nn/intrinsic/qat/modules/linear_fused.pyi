from torch.nn.intrinsic.qat.modules.linear_fused import *

from torch.nn.intrinsic.qat.modules.conv_fused import *

from torch.nn.intrinsic.quantized.dynamic.modules import *

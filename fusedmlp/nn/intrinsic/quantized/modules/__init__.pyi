from torch.nn.intrinsic.quantized.modules import *

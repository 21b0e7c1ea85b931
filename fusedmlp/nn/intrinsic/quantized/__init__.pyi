from torch.nn.intrinsic.quantized import *

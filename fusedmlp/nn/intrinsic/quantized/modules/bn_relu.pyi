from torch.nn.intrinsic.quantized.modules.bn_relu import *

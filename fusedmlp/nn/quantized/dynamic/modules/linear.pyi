from torch.nn.quantized.dynamic.modules.linear import *

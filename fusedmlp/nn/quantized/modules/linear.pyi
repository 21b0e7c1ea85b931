from torch.nn.quantized.modules.linear import *

from torch.nn.quantized._reference.modules.linear import *

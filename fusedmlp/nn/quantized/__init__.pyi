from torch.nn.quantized import *

from torch.nn.quantized.modules import *

from torch.nn.quantized.functional import *

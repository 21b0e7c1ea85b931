from torch.nn.quantized._reference import *

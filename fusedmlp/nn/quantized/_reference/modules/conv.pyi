from torch.nn.quantized._reference.modules.conv import *

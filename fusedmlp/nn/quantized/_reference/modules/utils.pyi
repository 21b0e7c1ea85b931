from torch.nn.quantized._reference.modules.utils import *

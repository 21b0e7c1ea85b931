from torch.nn.quantized.modules.utils import *

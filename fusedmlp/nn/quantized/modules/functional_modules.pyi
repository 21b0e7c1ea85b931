from torch.nn.quantized.modules.functional_modules import *

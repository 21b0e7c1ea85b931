from torch.nn.qat.dynamic.modules import *

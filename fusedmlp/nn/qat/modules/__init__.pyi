from torch.nn.qat.modules import *

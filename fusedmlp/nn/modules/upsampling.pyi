from torch.nn.modules.upsampling import *

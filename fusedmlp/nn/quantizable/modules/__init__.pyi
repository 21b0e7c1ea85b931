from torch.nn.quantizable.modules import *

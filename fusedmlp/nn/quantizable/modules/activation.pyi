from torch.nn.quantizable.modules.activation import *

from torch.nn.quantizable import *

from torch.nn.cpp import *

from torch.nn.qat import *

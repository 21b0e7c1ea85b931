from torch.nn.modules._functions import *

from torch.nn.utils.fusion import *
from torch.nn.utils.fusion import ConvT as ConvT
from torch.nn.utils.fusion import LinearT as LinearT

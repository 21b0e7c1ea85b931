from torch.nn.modules.dropout import *
from torch.nn.modules.dropout import _DropoutNd as _DropoutNd

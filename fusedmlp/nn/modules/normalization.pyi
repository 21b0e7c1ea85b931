from torch.nn.modules.normalization import *
from torch.nn.modules.normalization import _shape_t as _shape_t

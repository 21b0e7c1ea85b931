from torch.nn.utils.memory_format import *
from torch.nn.utils.memory_format import _M as _M

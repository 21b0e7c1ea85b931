from torch.nn.modules.lazy import *
from torch.nn.modules.lazy import _LazyProtocol as _LazyProtocol

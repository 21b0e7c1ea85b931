from torch.nn.parallel.scatter_gather import *
from torch.nn.parallel.scatter_gather import T as T
from torch.nn.parallel.scatter_gather import _is_namedtuple as _is_namedtuple
from torch.nn.parallel.scatter_gather import is_namedtuple as is_namedtuple

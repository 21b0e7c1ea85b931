from torch.nn.parallel import *
from torch.nn.parallel import DistributedDataParallelCPU as DistributedDataParallelCPU

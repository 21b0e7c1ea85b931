from torch.nn.modules.loss import *
from torch.nn.modules.loss import _Loss as _Loss
from torch.nn.modules.loss import _WeightedLoss as _WeightedLoss

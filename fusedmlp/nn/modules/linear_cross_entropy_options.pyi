from torch.nn.modules.linear_cross_entropy_options import *
from torch.nn.modules.linear_cross_entropy_options import _VALID_ACC_POLICIES as _VALID_ACC_POLICIES
from torch.nn.modules.linear_cross_entropy_options import _auto_acc_policy as _auto_acc_policy

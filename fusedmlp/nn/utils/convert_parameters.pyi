from torch.nn.utils.convert_parameters import *
from torch.nn.utils.convert_parameters import _check_param_device as _check_param_device

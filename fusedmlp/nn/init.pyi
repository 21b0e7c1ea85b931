from torch.nn.init import *
from torch.nn.init import _FanMode as _FanMode
from torch.nn.init import _NonlinearityType as _NonlinearityType
from torch.nn.init import _P as _P
from torch.nn.init import _R as _R
from torch.nn.init import _calculate_correct_fan as _calculate_correct_fan
from torch.nn.init import _calculate_fan_in_and_fan_out as _calculate_fan_in_and_fan_out
from torch.nn.init import _make_deprecate as _make_deprecate
from torch.nn.init import _no_grad_fill_ as _no_grad_fill_
from torch.nn.init import _no_grad_normal_ as _no_grad_normal_
from torch.nn.init import _no_grad_trunc_normal_ as _no_grad_trunc_normal_
from torch.nn.init import _no_grad_uniform_ as _no_grad_uniform_
from torch.nn.init import _no_grad_zero_ as _no_grad_zero_

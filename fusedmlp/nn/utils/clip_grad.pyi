from torch.nn.utils.clip_grad import *
from torch.nn.utils.clip_grad import _P as _P
from torch.nn.utils.clip_grad import _R as _R
from torch.nn.utils.clip_grad import _clip_grads_with_norm_ as _clip_grads_with_norm_
from torch.nn.utils.clip_grad import _get_total_norm as _get_total_norm
from torch.nn.utils.clip_grad import _no_grad as _no_grad
from torch.nn.utils.clip_grad import _tensor_or_tensors as _tensor_or_tensors

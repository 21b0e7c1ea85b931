from torch.nn.backends.thnn import *
from torch.nn.backends.thnn import _get_thnn_function_backend as _get_thnn_function_backend

from torch.nn.parallel.replicate import *
from torch.nn.parallel.replicate import T as T
from torch.nn.parallel.replicate import _broadcast_coalesced_reshape as _broadcast_coalesced_reshape
from torch.nn.parallel.replicate import _init_script_module as _init_script_module
from torch.nn.parallel.replicate import _is_jit_enabled as _is_jit_enabled
from torch.nn.parallel.replicate import _is_script_method as _is_script_method
from torch.nn.parallel.replicate import _is_script_module as _is_script_module
from torch.nn.parallel.replicate import _replicatable_module as _replicatable_module

from torch.nn.utils.spectral_norm import *
from torch.nn.utils.spectral_norm import T_module as T_module

from torch.nn.attention import *
from torch.nn.attention import _FlashAttentionImpl as _FlashAttentionImpl
from torch.nn.attention import _RegisterFn as _RegisterFn
from torch.nn.attention import _backend_from_string as _backend_from_string
from torch.nn.attention import _backend_names as _backend_names
from torch.nn.attention import _cur_sdpa_kernel_backends as _cur_sdpa_kernel_backends
from torch.nn.attention import _get_flash_version as _get_flash_version
from torch.nn.attention import _raise_kernel_warnings as _raise_kernel_warnings
from torch.nn.attention import _sdpa_kernel as _sdpa_kernel
from torch.nn.attention import _sdpa_kernel_variadic as _sdpa_kernel_variadic

from torch.nn.utils.parametrizations import *
from torch.nn.utils.parametrizations import _OrthMaps as _OrthMaps
from torch.nn.utils.parametrizations import _Orthogonal as _Orthogonal
from torch.nn.utils.parametrizations import _SpectralNorm as _SpectralNorm
from torch.nn.utils.parametrizations import _WeightNorm as _WeightNorm
from torch.nn.utils.parametrizations import _is_orthogonal as _is_orthogonal
from torch.nn.utils.parametrizations import _make_orthogonal as _make_orthogonal

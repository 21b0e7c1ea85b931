from torch.nn.modules.conv import *
from torch.nn.modules.conv import _ConvNd as _ConvNd
from torch.nn.modules.conv import _ConvTransposeMixin as _ConvTransposeMixin
from torch.nn.modules.conv import _ConvTransposeNd as _ConvTransposeNd
from torch.nn.modules.conv import _LazyConvXdMixin as _LazyConvXdMixin
from torch.nn.modules.conv import convolution_notes as convolution_notes

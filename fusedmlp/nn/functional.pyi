from torch.nn.functional import *
from torch.nn.functional import _canonical_mask as _canonical_mask
from torch.nn.functional import _none_or_dtype as _none_or_dtype

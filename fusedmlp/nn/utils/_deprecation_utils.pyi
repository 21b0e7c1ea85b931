from torch.nn.utils._deprecation_utils import *

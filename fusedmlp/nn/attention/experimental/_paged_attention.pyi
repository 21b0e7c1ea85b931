from torch.nn.attention.experimental._paged_attention import *

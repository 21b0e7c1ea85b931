from torch.nn.utils._named_member_accessor import *

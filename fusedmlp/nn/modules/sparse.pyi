from torch.nn.modules.sparse import *

from torch.nn.quantized._reference.modules.sparse import *

from torch.nn.quantized.modules.embedding_ops import *

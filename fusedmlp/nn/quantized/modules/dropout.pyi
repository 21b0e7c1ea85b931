from torch.nn.quantized.modules.dropout import *

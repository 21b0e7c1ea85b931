from torch.nn.quantized.dynamic.modules.rnn import *

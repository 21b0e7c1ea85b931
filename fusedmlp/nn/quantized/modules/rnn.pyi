from torch.nn.quantized.modules.rnn import *

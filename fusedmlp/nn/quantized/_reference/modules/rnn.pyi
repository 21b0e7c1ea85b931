from torch.nn.quantized._reference.modules.rnn import *

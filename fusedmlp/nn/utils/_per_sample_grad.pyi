from torch.nn.utils._per_sample_grad import *

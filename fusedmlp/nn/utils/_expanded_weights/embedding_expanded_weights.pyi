from torch.nn.utils._expanded_weights.embedding_expanded_weights import *

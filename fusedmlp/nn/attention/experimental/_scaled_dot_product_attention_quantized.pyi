from torch.nn.attention.experimental._scaled_dot_product_attention_quantized import *

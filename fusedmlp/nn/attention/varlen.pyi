from torch.nn.attention.varlen import *
from torch.nn.attention.varlen import _backward as _backward
from torch.nn.attention.varlen import _can_use_cudnn as _can_use_cudnn
from torch.nn.attention.varlen import _normalize_window_size as _normalize_window_size
from torch.nn.attention.varlen import _setup_context as _setup_context
from torch.nn.attention.varlen import _should_use_cudnn as _should_use_cudnn
from torch.nn.attention.varlen import _varlen_attn as _varlen_attn
from torch.nn.attention.varlen import _varlen_attn_backward as _varlen_attn_backward
from torch.nn.attention.varlen import _varlen_attn_backward_fake as _varlen_attn_backward_fake
from torch.nn.attention.varlen import _varlen_attn_fake as _varlen_attn_fake
from torch.nn.attention.varlen import _varlen_attn_out as _varlen_attn_out
from torch.nn.attention.varlen import _varlen_attn_out_fake as _varlen_attn_out_fake
from torch.nn.attention.varlen import log as log

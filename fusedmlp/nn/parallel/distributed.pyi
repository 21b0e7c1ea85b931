from torch.nn.parallel.distributed import *
from torch.nn.parallel.distributed import RPC_AVAILABLE as RPC_AVAILABLE
from torch.nn.parallel.distributed import _BucketCapacityConfig as _BucketCapacityConfig
from torch.nn.parallel.distributed import _BufferCommHook as _BufferCommHook
from torch.nn.parallel.distributed import _BufferCommHookLocation as _BufferCommHookLocation
from torch.nn.parallel.distributed import _DDPJoinHook as _DDPJoinHook
from torch.nn.parallel.distributed import _DDPSink as _DDPSink
from torch.nn.parallel.distributed import _DEFAULT_BUCKET_CAP_MB as _DEFAULT_BUCKET_CAP_MB
from torch.nn.parallel.distributed import _MB_TO_BYTES as _MB_TO_BYTES
from torch.nn.parallel.distributed import _MixedPrecision as _MixedPrecision
from torch.nn.parallel.distributed import _cast_buffers as _cast_buffers
from torch.nn.parallel.distributed import _dump_DDP_relevant_env_vars as _dump_DDP_relevant_env_vars
from torch.nn.parallel.distributed import _find_tensors as _find_tensors
from torch.nn.parallel.distributed import _setup_mixed_precision_params as _setup_mixed_precision_params
from torch.nn.parallel.distributed import _tree_flatten_with_rref as _tree_flatten_with_rref
from torch.nn.parallel.distributed import _tree_unflatten_with_rref as _tree_unflatten_with_rref
from torch.nn.parallel.distributed import logger as logger

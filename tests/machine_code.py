"""What every compiled kernel must keep to, for the tests that compile: what ptxas says, the chips' limits."""

import re
from typing import Any

REGISTERS = 65536  # of a multiprocessor: a program with more cannot be launched
TENSOR_MEMORY_COLUMNS = 512
KB = 1024
# Of sm_<number>: the most that one program may use.
SHARED_MEMORY = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}
SMALLEST_SHARED_MEMORY = min(SHARED_MEMORY.values())


def resources(report: str, metadata: Any) -> dict[str, Any] | None:
    """What one build uses, from ptxas's report and Triton's metadata; None if the report does not say it."""
    used = re.search(r"Used (\d+) registers", report)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not used or not stack:
        return None
    return {
        "registers": int(used[1]),
        "threads": 32 * metadata.num_warps,
        "stack": int(stack[1]),
        "spills": int(stack[2]) + int(stack[3]),
        "serialised": re.findall(r"C751[0-6]", report),
        "shared_memory": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
    }


def too_much(build: dict[str, Any], shared_memory: int) -> list[str]:
    """Which limits a build passes, in words. shared_memory: the bytes that a program may use."""
    found = []
    # Triton checks none of the first four. Each is a cliff: registers spilled to memory, wgmma instructions
    # that ptxas serialised, and a body that ptxas replaced by a trap.
    if -(-build["registers"] // 8) * 8 * build["threads"] > REGISTERS:
        found.append(f"{build['registers']} registers for each of {build['threads']} threads")
    if build["spills"]:
        found.append(f"{build['spills']} bytes spilled")
    if build["serialised"]:
        found.append(f"wgmma serialised: {build['serialised']}")
    if build["registers"] < 64 and build["stack"] > 1024:
        found.append(f"{build['registers']} registers and a stack of {build['stack']} bytes")
    if build["shared_memory"] > shared_memory:
        found.append(f"{build['shared_memory']} bytes of shared memory")
    if build["tensor_memory"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"{build['tensor_memory']} columns of tensor memory")
    return found

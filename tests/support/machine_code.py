"""The limits of the chips, and what ptxas and the machine code tell of a build."""

import pathlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from typing import Any

REGISTERS = 65536  # on one multiprocessor; a program with more cannot be launched
TENSOR_MEMORY_COLUMNS = 512
KB = 1024
# The most shared memory that one program may use, by the number of sm_<number>.
SHARED_MEMORY = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}
SMALLEST_SHARED_MEMORY = min(SHARED_MEMORY.values())


def resources(report: str, metadata: Any) -> dict[str, Any] | None:
    """What one build uses, from ptxas's report and Triton's metadata; None if the report lacks it."""
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
    """Which limits a build exceeds, in words. shared_memory: the bytes that a program may use."""
    found = []
    # Triton checks none of the first four, which make a kernel fail or much slower: too many registers,
    # registers spilled to memory, wgmma instructions that ptxas serialised, a body replaced by a trap.
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


# The machine instructions into which ptxas translates the multiplications of PTX.
SASS_OF = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA", "fma.rn.f32": "FFMA"}
MULTIPLY = (*SASS_OF.values(), "UTCQMMA", "FFMA2")
_disassembled: set[tuple[Any, ...]] = set()


def instructions_of(kernel: str, kind: str | None, tile: Any, asm: dict[str, Any]) -> dict[str, Any]:
    """How many machine instructions one build has, and which of them multiply.

    Disassembling takes as long as compiling, so only the first build of each kernel and tile is disassembled.
    For the others, the count comes from the size of the machine code and the multiplications from PTX.
    """
    count = machine_instructions(asm["cubin"])
    multiply = {sass: asm["ptx"].count(ptx) for ptx, sass in SASS_OF.items()}
    if (kernel, kind, tile) not in _disassembled:
        _disassembled.add((kernel, kind, tile))
        listed = disassemble(asm["cubin"])
        assert listed.total() == count, f"{listed.total()} instructions in the listing, {count} by the size"
        multiply = {name: listed[name] for name in MULTIPLY}
    return {"multiply": {name: times for name, times in multiply.items() if times}, "instructions": count}


def machine_instructions(cubin: bytes) -> int:
    """Count the instructions, of 16 bytes each, in the executable sections of an ELF file."""
    headers, size, count = (*struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HH", cubin, 0x3A))
    executable = 0
    for i in range(count):
        flags, _, _, length = struct.unpack_from("<QQQQ", cubin, headers + i * size + 8)
        executable += length if flags & 4 else 0  # SHF_EXECINSTR
    return executable // 16


def disassemble(cubin: bytes) -> Counter[str]:
    """How often each machine instruction occurs."""
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    pattern = r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]*)"
    return Counter(re.findall(pattern, run.stdout, re.MULTILINE))

"""How this process's allocator treats large buffers. Knows no arrays."""

import ctypes
import platform

# mallopt(3): never give the heap's end back, never use mmap, one heap for all threads (others cannot hold large blocks)
_SETTINGS = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next allocation instead of giving it back to the system.

    XLA:CPU allocates a step's temporaries anew each time; given back, every page of them is faulted in again: 414,000
    faults and 15 % of the CPU time of a 42M-parameter training step, against 500 (docs/benchmarks/training.md). The
    process then never shrinks, which a training run would not anyway. Call it before the first array.

    Returns whether the allocator took it: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in _SETTINGS.values())

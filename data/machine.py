"""What this machine has, and how to use it: device, number type, memory, Ctrl-C and SIGTERM."""

import contextlib
import ctypes
import signal
import threading

import torch

from data.errors import Terminated, UserError


def pick_device(name):
    """"auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError if the named device is not
    there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        available = ["cuda", *numbered, *available]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(f"--device {name} is not available here; use one of: auto, "
                        f"{', '.join(available)}.")
    return torch.device(name)


def pick_dtype(name):
    """float32 or bfloat16. Raises UserError for another name."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise UserError(f"--dtype {name} is unknown; use one of: {', '.join(kinds)}.")
    return kinds[name]


def fast_bfloat16(device):
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


@contextlib.contextmanager
def float32_products(precision):
    """A block in which float32 matrices are multiplied exactly ("highest"), or by TF32, which keeps
    10 bits, where a GPU has it ("high")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def keep_freed_memory():
    """A block, or a function that this decorates, in which freed tensors stay with the process.

    By default glibc returns every large block of memory to the system, which clears each page again
    at the next use: a fifth of the time of a training step. A loop asks for the same sizes over and
    over, so little is wasted; work of ever other sizes would leave holes. Does nothing where the C
    library is another.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_limit = libc.mallopt
        give_back = libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
    set_limit(M_MMAP_MAX, 0)                            # no block is too large for the heap
    set_limit(M_TRIM_THRESHOLD, 2**31 - 1)              # the heap does not shrink
    try:
        yield
    finally:
        set_limit(M_MMAP_MAX, 65536)                    # glibc's defaults
        set_limit(M_TRIM_THRESHOLD, 128 * 1024)
        give_back(0)


@contextlib.contextmanager
def deferred_interrupt():
    """Yields a function that tells by what the loop is to stop between two steps: KeyboardInterrupt
    for Ctrl-C, Terminated for SIGTERM, None for nothing yet.

    The second signal stops it at once. Outside the main thread Python delivers no signals, and
    nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    received = []

    def handler(number, frame):
        if received:
            raise kinds[number]
        received.append(kinds[number])

    handlers_before = {number: signal.signal(number, handler) for number in kinds}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, before in handlers_before.items():
            signal.signal(number, before)

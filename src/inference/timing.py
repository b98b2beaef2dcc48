"""One timed pass of prefill and decoding, and the memory that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from xlstm_scaling.inference.decoder import make_decoder
from xlstm_scaling.inference.generation import prefill
from xlstm_scaling.models import LanguageModel

SAMPLING_INTERVAL_S = 1e-3


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def timed_pass(
    model: LanguageModel,
    prompt: Tensor,
    steps: int,
    prefill_chunk: int | None = None,
    mark: Callable[[], None] = lambda: None,
) -> tuple[float, list[float]]:
    """Read a prompt (B, T) int64 into an empty state, ``prefill_chunk`` tokens at a time (None: at once), then decode
    ``steps`` tokens greedily by the fastest decoder. ``mark`` is called before the prompt, after its first token and
    after the last step, with the device at rest.

    The decoder is made before the clock starts, as a server makes it once: static memory, on a GPU its graphs.

    Returns:
        Time to first token [s] (static state emptied, prompt read, the state given to the decoder, argmax of the last
        logits) and the time of each of the ``steps`` decode steps [s] (one token of every sequence through the model,
        argmax). The garbage collector rests in between.
    """
    device, batch, length = prompt.device, *prompt.shape
    enabled = gc.isenabled()
    gc.disable()
    try:
        decoder = make_decoder(model, batch, length + steps, prompt_length=length)
        _synchronise(device)
        mark()
        start = time.perf_counter()
        logits, state = prefill(model, prompt, decoder.start(), prefill_chunk)
        decoder.take(state)
        token = logits.argmax(-1)
        _synchronise(device)
        ttft_s = time.perf_counter() - start
        mark()
        step_times_s = []
        for _ in range(steps):
            start = time.perf_counter()
            token = decoder.greedy(token)
            _synchronise(device)
            step_times_s.append(time.perf_counter() - start)
        mark()
    finally:
        if enabled:
            gc.enable()
    return ttft_s, step_times_s


def prepare(model: LanguageModel, dtype: torch.dtype, device: str = "cpu") -> LanguageModel:
    """The model in evaluation mode, computing in ``dtype``, its matrices cast once instead of in every forward pass.

    Norms, embedding and the mLSTM gates (the linear maps with a bias) stay fp32: they are computed in fp32.
    """
    model = model.to(device).eval().requires_grad_(False)
    model.compute_dtype = dtype
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            module.weight.data = module.weight.data.to(dtype)
    return model


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, as they lie in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _release_freed_memory() -> None:
    """Hand freed heap pages back to the system (glibc), so that they do not hide a later allocation."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


@contextlib.contextmanager
def _resident_peak() -> Iterator[Callable[[], int]]:
    """Peak resident set of this process in the block [bytes]: the kernel's own mark on Linux, else sampled every ms."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
        _high_water_bytes()
    except OSError:
        pass
    else:
        yield _high_water_bytes
        return
    process, stop = psutil.Process(), threading.Event()
    peak = [process.memory_info().rss]

    def watch() -> None:
        while not stop.wait(SAMPLING_INTERVAL_S):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(peak[0], process.memory_info().rss)
    finally:
        stop.set()
        thread.join()


def pass_memory(
    model: LanguageModel, prompt: Tensor, steps: int, prefill_chunk: int | None = None
) -> tuple[float, int]:
    """An untimed-for-the-record pass -> (its wall time [s], peak memory [bytes]).

    Peak memory is the bytes of the parameters plus what the pass took on top (state, activations, buffers of the
    libraries): on the CPU the rise of the process' resident set, on a GPU the rise of torch's allocated memory.
    """
    start = time.perf_counter()
    if prompt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(prompt.device)
        before = torch.cuda.memory_allocated(prompt.device)
        timed_pass(model, prompt, steps, prefill_chunk)
        peak = torch.cuda.max_memory_allocated(prompt.device)
    else:
        _release_freed_memory()
        before = psutil.Process().memory_info().rss
        with _resident_peak() as read_peak:
            timed_pass(model, prompt, steps, prefill_chunk)
            peak = read_peak()
    return time.perf_counter() - start, parameter_bytes(model) + max(0, peak - before)


def available_bytes(device: str) -> int:
    """Memory that a pass may still take [bytes]."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator says it in words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)

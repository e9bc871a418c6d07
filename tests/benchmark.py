"""Speed and memory, each row against another way of doing the same, in one run.

    python tests/benchmark.py
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def in_a_process(setup, work):
    """Peak memory above what `setup` left, in MiB, and seconds that `work` takes, in a process of its own."""
    script = f"""
import resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
{setup}
before, begun = peak(), time.perf_counter()
{work}
print(peak() - before, time.perf_counter() - begun)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return map(float, done.stdout.split())


def dfa():
    """DFA of one feature for a batch of GPT-2 Small's size: ours, and through the (B,H,q,k,d_head) tensor of
    implementations that multiply pattern and values first and sum over d_head last."""
    setup = """
import torch, attribution
B, T, H, d_head = 8, 128, 12, 64
pattern, v, w = torch.rand(B, H, T, T), torch.randn(B, T, H, d_head), torch.randn(H * d_head)
attribution.dfa(pattern[:1, :, :2, :2], v[:1, :2], w)
"""
    ours = "found = attribution.dfa(pattern, v, w)"
    theirs = """
moved = pattern[..., None] * v.permute(0, 2, 1, 3)[:, :, None]
found = (moved * w.unflatten(0, (H, d_head))[:, None, None]).sum(-1)
"""
    memory, seconds = in_a_process(setup, ours)
    memory_theirs, seconds_theirs = in_a_process(setup, theirs)
    print(f"DFA, 8 rows of 128 tokens, 12 heads of 64:   {memory:8.0f} MiB {seconds:8.3f} s")
    print(f"the same through (B,H,q,k,d_head):           {memory_theirs:8.0f} MiB {seconds_theirs:8.3f} s   "
          f"{memory_theirs / memory:.0f} x the memory, {seconds_theirs / seconds:.0f} x the time")


if __name__ == "__main__":
    dfa()

"""What an exact derivative of a network costs: memory and time of attention, operations and accuracy of the modes.

    python benchmarks/tangents.py --tokens 4096 --heads 4 --head-dim 32

Attention: forward-mode derivative of one layer, ours in chunks of queries and torch's MATH backend; peak of the bytes
that the allocator hands out, CPU or GPU seconds, medians over repeats that alternate between the two. Updates: a small
transformer, value with gradient and tangent, in units of the value with gradient alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from results import write_result
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.attention import attention
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.tangents import tangent, value_and_tangent

#: ways to the value with gradient and the tangent: modes of ``tangents``, and the exact one in one pass
MODES = ("jvp", "one_pass", "central", "one_sided")


def math_attention(*arguments: Tensor) -> Tensor:
    """Attention by torch's own differentiable backend."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes allocated at one time within a call, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        function()
    live = top = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of this process, or wall-clock seconds of the GPU."""
    clock = time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def attention_rows(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One row per implementation."""
    shape = (1, args.heads, args.tokens, args.head_dim)
    inputs = tuple(torch.randn(shape, device=device) for _ in range(3))
    directions = tuple(torch.randn(shape, device=device) for _ in range(3))
    routes = {"chunked": attention, "math": math_attention}
    calls = {name: lambda f=f: torch.func.jvp(f, inputs, directions) for name, f in routes.items()}
    values = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(args.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    difference = (values["chunked"][1] - values["math"][1]).norm() / values["math"][1].norm()
    return [
        {
            "what": "attention tangent",
            "route": name,
            "tokens": args.tokens,
            "heads": args.heads,
            "head_dim": args.head_dim,
            "dtype": "float32",
            "peak_bytes": peak_bytes(call, device),
            "seconds": statistics.median(times[name]),
            "relative_difference": float(difference),
        }
        for name, call in calls.items()
    ]


def update_rows(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Operations, seconds and accuracy of an update by mode."""
    network = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=32,
    ).eval().to(device)  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():  # output layers start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    cond = {
        "encoder_hidden_states": torch.randn(2, 16, 64, device=device),
        "pooled_projections": torch.randn(2, 64, device=device),
    }
    x, dx = torch.randn(2, 4, 32, 32, device=device), torch.randn(2, 4, 32, 32, device=device)
    t = torch.tensor([0.35, 0.7], dtype=torch.float64, device=device)

    def f(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, cond).velocity

    def plain() -> None:
        f(x, t).sum().backward()

    def both(mode: str) -> tuple[Tensor, Tensor]:
        one_pass = mode == "one_pass"
        kind: Any = "jvp" if one_pass else mode
        return value_and_tangent(f, (x, t), (dx, 1.0), kind, one_pass=one_pass)

    def update(mode: str) -> None:
        both(mode)[0].sum().backward()

    calls = {"none": plain, **{mode: lambda mode=mode: update(mode) for mode in MODES}}
    counts, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops()
    for _ in range(args.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    with torch.no_grad():
        exact = tangent(f, (x, t), (dx, 1.0))[1]
    errors = {mode: float((both(mode)[1] - exact).norm() / exact.norm()) for mode in MODES}
    return [
        {
            "what": "update",
            "mode": mode,
            "network": "SD3 transformer, 4 layers of width 128, 256 tokens",
            "flop_ratio": counts[mode] / counts["none"],
            "time_ratio": statistics.median(a / b for a, b in zip(times[mode], times["none"])),
            "relative_error": errors[mode],
        }
        for mode in MODES
    ]


def main() -> None:
    """Measure and write ``tangents``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    rows = attention_rows(args, device) + update_rows(args, device)
    chunked, by_math = rows[0], rows[1]
    figures = {
        "rows": rows,
        "memory_ratio": chunked["peak_bytes"] / by_math["peak_bytes"],  # type: ignore[operator]
        "time_ratio": chunked["seconds"] / by_math["seconds"],  # type: ignore[operator]
    }
    for row in rows:
        print(row)
    print({k: v for k, v in figures.items() if k != "rows"})
    write_result("tangents", figures, seeds=[0])


if __name__ == "__main__":
    main()

"""Step time and memory per device of DDP and FSDP2, predicted from the model, the batch and the links; and measured.

    python scripts/scaling.py --weights 86e6 --flops 35e9 --batch 64 --gpu h100            # a table up to 1,024 GPUs
    python scripts/scaling.py --check                                                      # against processes here

Of a step with b examples a device, F operations in an example's forward pass, P weights of which T train, N devices:

    compute     = (F + F_backward) b / (peak x efficiency), F_backward = F (1 + T/P): gradients of inputs and of weights
    all-reduce  = 2 (N-1)/N 4T / link + 2 log2(N) latency                                         (DDP; rings and trees)
    gather      = 2 (N-1)/N 4P / link, reduce-scatter = (N-1)/N 4T / link, + 3 units (N-1) latency (FSDP2)
    step        = forward + max(backward, what overlaps it) + optimizer (its bytes over the memory's bandwidth)

`link` is that of the slowest hop: between machines as soon as N exceeds one machine. Memory: weights, gradients and two
moments in fp32 (16 bytes a weight that trains, 4 otherwise), DDP's buckets (4 T), activations as given; under FSDP2 all
but the activations is divided by N, and two units are whole. Ring and overlap as in Rajbhandari et al. 2020 (ZeRO),
section 7, and Zhao et al. 2023 (PyTorch FSDP). The replay of frozen groups is left out: it makes stages cheaper.

--check measures here what the formulas need (a step of one process, an all-reduce and a gather of the same bytes, and
how much slower a step is when N processes share the cores), predicts 2 and 4 processes from it, and runs them.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "scaling.json"


@dataclass(frozen=True)
class Device:
    """Operations a second that are reached, bytes a second of memory and links, seconds of latency, devices a machine.

    The figures of `DEVICES` are the makers' for dense bf16, NVLink and one 400 Gbit/s adapter a GPU (A100: 200), times
    an efficiency of 0.4 for operations and 0.7 for links, which is what well-tuned training reaches; latencies, which
    decide beyond a few hundred devices, are a guess.
    """

    flops: float
    memory: float
    inside: float
    between: float
    latency: float
    per_machine: int


DEVICES = {
    "h100": Device(0.4 * 989e12, 0.8 * 3.35e12, 0.7 * 450e9, 0.7 * 50e9, 5e-6, 8),
    "a100": Device(0.4 * 312e12, 0.8 * 2.0e12, 0.7 * 300e9, 0.7 * 25e9, 5e-6, 8),
    "l4": Device(0.4 * 121e12, 0.8 * 0.3e12, 0.7 * 32e9, 0.7 * 12.5e9, 1e-5, 8),
}


@dataclass(frozen=True)
class Job:
    """A training: weights, of which train, operations of an example's forward pass, examples a device, units (blocks),
    bytes of activations an example."""

    weights: float
    trainable: float
    flops: float
    batch: float
    units: int
    activations: float


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and what of it waits for links; bytes on each device."""

    seconds: float
    exposed: float
    memory: float


def predicted(job: Job, device: Device, count: int, way: str) -> Step:
    """One step on `count` devices, `way` "ddp" or "fsdp2"."""
    link = device.inside if count <= device.per_machine else device.between
    share = (count - 1) / count
    forward = job.flops * job.batch / device.flops
    backward = forward * (1 + job.trainable / job.weights)
    parts = count if way == "fsdp2" else 1
    optimizer = 28 * job.trainable / parts / device.memory  # reads gradient, weight, two moments; writes three
    if way == "ddp":
        reduce = 2 * share * 4 * job.trainable / link + 2 * math.log2(count) * device.latency
        exposed = max(0.0, reduce - backward)
        memory = 4 * job.weights + (12 + 4 * (count > 1)) * job.trainable
    else:
        gather = share * 4 * job.weights / link + job.units * (count - 1) * device.latency
        scatter = share * 4 * job.trainable / link + job.units * (count - 1) * device.latency
        exposed = max(0.0, gather - forward) + max(0.0, gather + scatter - backward)
        memory = (4 * job.weights + 12 * job.trainable) / count + 2 * 8 * job.weights / job.units * (count > 1)
    return Step(forward + backward + exposed + optimizer, exposed, memory + job.activations * job.batch)


def table(job: Job, device: Device) -> None:
    """Both ways, up to 1,024 devices."""
    print("| devices | way | step, ms | waiting for links, ms | examples a second | share of linear | memory, GiB |")
    print("|---|---|---|---|---|---|---|")
    for way in ("ddp", "fsdp2"):
        alone = predicted(job, device, 1, way).seconds
        for count in (1, 2, 4, 8, 16, 64, 256, 1024):
            step = predicted(job, device, count, way)
            rate = count * job.batch / step.seconds
            print(
                f"| {count} | {way} | {1e3 * step.seconds:.1f} | {1e3 * step.exposed:.1f} | {rate:,.0f} | "
                f"{alone / step.seconds:.0%} | {step.memory / 2**30:.1f} |"
            )


# Measured here

WIDTH, DEPTH, BATCH, STEPS = 512, 12, 64, 12


def check(counts: list[int]) -> None:
    """Predict and measure steps of a network of linear blocks on this machine's cores."""
    alone = launched(1, "ddp")
    rows = []
    for way in ("ddp", "fsdp2"):
        for count in counts:
            found = launched(count, way)
            # A process that shares its core with others computes for longer: that is measured without any link.
            slower = found["alone_together"] / alone["alone_together"]
            job = Job(DEPTH * WIDTH**2, DEPTH * WIDTH**2, 2 * DEPTH * WIDTH**2, BATCH, DEPTH, 0)
            compute = alone["alone_together"] * slower
            if way == "ddp":
                # Processes share cores with the copies of their links: nothing overlaps here.
                seconds = compute + found["all_reduce"]
            else:
                seconds = compute + 2 * found["gather"] + found["scatter"]
            rows.append({
                "way": way, "processes": count, "predicted": round(seconds, 4), "measured": round(found["step"], 4),
                "predicted/measured": round(seconds / found["step"], 2), "slower by sharing cores": round(slower, 2),
                "all_reduce": round(found["all_reduce"], 4), "gather": round(found["gather"], 4),
                "scatter": round(found["scatter"], 4), "memory, MiB": round(found["bytes"] / 2**20, 1),
                "predicted MiB": round(predicted(job, DEVICES["l4"], count, way).memory / 2**20, 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


def launched(count: int, way: str) -> dict[str, float]:
    """What the first of `count` processes measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, __file__, "--measure", way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(way: str) -> None:
    """In each process: medians of a step without and with links, and of the bare collectives of its bytes."""
    import statistics

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count = dist.get_world_size()

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(DEPTH)))

    def seconds(run: object) -> float:
        times = []
        for _ in range(STEPS):
            dist.barrier()
            begin = time.perf_counter()
            run()  # type: ignore[operator]
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    inputs = torch.randn(BATCH, WIDTH)

    def stepper(model: nn.Module) -> object:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step.optimizer = optimizer  # type: ignore[attr-defined]
        return step

    found = {"alone_together": seconds(stepper(network()))}
    model: nn.Module = network()
    if way == "ddp":
        model = DistributedDataParallel(model) if count > 1 else model
    else:
        for block in model:  # type: ignore[attr-defined]
            fully_shard(block)
        fully_shard(model)
    run = stepper(model)
    found["step"] = seconds(run)
    weights = torch.zeros(DEPTH * WIDTH**2)
    part = torch.zeros(DEPTH * WIDTH**2 // count)
    found["all_reduce"] = seconds(lambda: dist.all_reduce(weights)) if count > 1 else 0.0
    pieces = [torch.zeros(WIDTH**2 // count) for _ in range(DEPTH)]
    blocks = [torch.zeros(WIDTH**2) for _ in range(DEPTH)]

    def gather() -> None:
        for piece, block in zip(pieces, blocks, strict=True):
            dist.all_gather_into_tensor(block, piece)

    def scatter() -> None:
        for piece, block in zip(pieces, blocks, strict=True):
            dist.reduce_scatter_tensor(piece, block)

    found["gather"] = seconds(gather) if count > 1 else 0.0
    found["scatter"] = seconds(scatter) if count > 1 else 0.0
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    state = run.optimizer.state.values()  # type: ignore[attr-defined]
    moments = [t.to_local() if hasattr(t, "to_local") else t for s in state for t in s.values()]
    # Weights and moments, gradients as large as the weights, and DDP's buckets.
    extra = 1 + (way == "ddp" and count > 1)
    found["bytes"] = 4.0 * (sum(t.numel() for t in [*local, *moments]) + extra * sum(t.numel() for t in local))
    del part
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=86e6, help="of the backbone (ViT-B/16: 86e6)")
    parser.add_argument("--trainable", type=float, help="of them that train; by default all")
    parser.add_argument("--flops", type=float, default=35e9, help="operations of an example's forward pass")
    parser.add_argument("--batch", type=float, default=64, help="examples a device")
    parser.add_argument("--units", type=int, default=12, help="blocks")
    parser.add_argument("--activations", type=float, default=100e6, help="bytes an example")
    parser.add_argument("--gpu", choices=DEVICES, default="h100")
    parser.add_argument("--between", type=float, help="bytes a second of a device's link to other machines")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)
    if options.check:
        return check(options.processes)
    device = DEVICES[options.gpu]
    device = replace(device, between=options.between) if options.between else device
    job = Job(options.weights, options.trainable or options.weights, options.flops, options.batch, options.units,
              options.activations)  # fmt: skip
    return table(job, device)


if __name__ == "__main__":
    main()

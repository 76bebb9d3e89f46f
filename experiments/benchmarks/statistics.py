"""What the statistics of a pair of convolutions cost, next to training the pair, to the dense path and to GroMo.

    python -m experiments.benchmarks.statistics                 # the whole table, some minutes on 2 cores
    python -m experiments.benchmarks.statistics --device cuda   # the same on a GPU
    python -m experiments.benchmarks.statistics --shape 32x32x32 --no-write

Every shape runs in a process of its own, in which all times of its row are taken, alternating and as medians. Peak
memory is measured in further processes, one per method, above what the process held before.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import growconv
from experiments.benchmarks.table import write_section
from growconv.statistics import ConsumerStatistics, StatisticsCollector

SHAPES = ("32x32x32", "32x64x32", "128x16x128", "64x32x128", "64x224x8", "512x8x64")
"""Channels x image x batch."""
TARGETS = {
    "32x32x32": (3.0, 60.0, "¼ of GroMo"),
    "32x64x32": (3.0, 150.0, "1/10 of GroMo"),
    "128x16x128": (4.0, 15.0, "¼ of GroMo"),
    "64x32x128": (3.0, None, "2 GB"),
    "64x224x8": (3.0, None, "4 GB"),
    "512x8x64": (6.0, None, "6 GB"),
}
"""All statistics ÷ forward+backward at most; GroMo ÷ ours at least, None where the dense path and GroMo are not run
(they hold gigabytes or take minutes); peak memory at most."""
COLUMNS = (
    "C", "image", "batch", "fwd+bwd ms", "ours ms", "ours ÷ fwd+bwd", "target", "finish ms", "peak MB", "target",
    "dense ÷ ours", "dense MB", "GroMo ÷ ours", "target", "GroMo MB",
)  # fmt: skip


class Bench:
    """One shape: a pair conv - ReLU - conv with biases, padded to keep the grid but for the first layer's stride.

    Args:
        shape: channels x image x batch, with kN for another kernel than 3 and sN for another stride of the first layer.
        device: where to run.
        clock: what to read times from.
    """

    def __init__(self, shape: str, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        parts = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:k(\d+))?(?:s(\d+))?", shape)
        if parts is None:
            raise SystemExit(f"{shape}: expected channels x image x batch, such as 64x16x32 or 64x16x32k5s2")
        given = [None if part is None else int(part) for part in parts.groups()]
        self.channels, self.image, self.batch = (part or 0 for part in given[:3])
        self.kernel, self.stride = given[3] or 3, given[4] or 1
        self.device, self.clock = torch.device(device), clock
        torch.manual_seed(0)
        c, k = self.channels, self.kernel
        first = nn.Conv2d(c, c, k, stride=self.stride, padding=k // 2)
        self.model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(c, c, k, padding=k // 2)).to(self.device)
        self.x = torch.randn(self.batch, c, self.image, self.image, device=self.device)
        self.gradient = torch.randn_like(self.model(self.x).detach()) / self.x[0].numel()
        self.site = growconv.site(self.model, "0", "2", example_input=self.x[:1])
        self.options: dict[str, Any] = {}
        self.compared = shape in TARGETS and TARGETS[shape][1] is not None

    def train_step(self) -> None:
        """Forward and backward of the pair alone; the images need no gradient."""
        self.model.zero_grad()
        self.model(self.x).backward(self.gradient)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, function: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.synchronize()
        start = self.clock()
        function()
        self.synchronize()
        return self.clock() - start

    def collector(self, path: str = "auto") -> "TimedCollector":
        """A collector of S, S2, M and N."""
        return TimedCollector(self, self.site, path)


class TimedCollector(StatisticsCollector):
    """A collector that adds up the time spent in its own work."""

    def __init__(self, bench: Bench, site: growconv.GrowthSite, path: str) -> None:
        super().__init__(bench.model, site, reduction="sum", path=path, **bench.options)
        self.bench = bench
        self.seconds = 0.0

    def _measure(self, *arguments: Any) -> None:
        self.seconds += self.bench.timed(lambda: StatisticsCollector._measure(self, *arguments))


def collection(bench: Bench, batches: int, path: str = "auto") -> float:
    """Seconds of a collection from the first batch to S, S2, M and N, all but solving for W*.

    The model's own forward and backward passes do not count, except where N needs them a second time.
    """
    collector = bench.collector(path)
    with collector:
        for _ in range(batches):
            bench.train_step()
    seconds = collector.seconds + bench.timed(lambda: collector.statistics)
    solved = _stands_in(collector)
    if collector.needs_second_pass:
        with collector.second_pass():
            seconds += bench.timed(lambda: [bench.train_step() for _ in range(batches)])
        seconds += bench.timed(lambda: collector.statistics)
    return seconds + bench.timed(lambda: _with_update(collector, solved).N)


def _stands_in(collector: StatisticsCollector) -> Tensor:
    """Any numbers for W*, entered so that nobody solves for it."""
    consumer = next(iter(collector.statistics.values())).consumer
    moments = consumer.M
    assert moments is not None  # it is among what was collected
    _with_update(collector, moments)
    return moments


def _with_update(collector: StatisticsCollector, update: Tensor) -> ConsumerStatistics:
    consumer = next(iter(collector.statistics.values())).consumer
    consumer.__dict__["best_update"] = update
    return consumer


def measure_update(bench: Bench, path: str = "auto") -> Callable[[], tuple[float, float]]:
    """A function that gives the seconds of one batch more, from collections of one and of three, and of the rest."""

    def update() -> tuple[float, float]:
        one = collection(bench, 1, path)
        batch = (collection(bench, 3, path) - one) / 2
        return batch, one - batch

    return update


def gromo_update(bench: Bench) -> Callable[[], float]:
    """The same for GroMo's full convolution module: its update alone, without its forward and backward."""
    from gromo.modules.conv2d_growing_module import Conv2dGrowingModule, FullConv2dGrowingModule

    c, size = bench.channels, (bench.image, bench.image)
    first = Conv2dGrowingModule(
        c, c, 3, padding=1, input_size=size, post_layer_function=nn.ReLU(), device=bench.device, name="first"
    )
    second = FullConv2dGrowingModule(
        c,
        c,
        3,
        padding=1,
        input_size=size,
        previous_module=first,
        allow_growing=True,
        device=bench.device,
        name="second",
    )
    second.init_computation()

    def update() -> float:
        first.zero_grad()
        second.zero_grad()
        second(first(bench.x)).backward(bench.gradient)
        return bench.timed(second.update_computation)

    return update


def peak_bytes(bench: Bench, function: Callable[[], Any]) -> int:
    """Peak memory of a call above what was held before: sampled resident size, or the allocator's count on a GPU."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    page = 4096
    statm = Path("/proc/self/statm")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before, peak, done = resident(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return max(peak, resident()) - before


def run_child(task: str, shape: str, device: str, threads: int) -> dict[str, Any]:
    """Run one task in a process of its own and read what it prints."""
    command = [sys.executable, "-m", "experiments.benchmarks.statistics", "--task", task]
    command += ["--shape", shape, "--device", device, "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        return {"failed": result.stderr.strip().splitlines()[-1:] or [f"ended with {result.returncode}"]}
    return json.loads(lines[-1])


def task_times(bench: Bench) -> dict[str, Any]:
    """All times of a row, alternating: forward+backward, ours, and as far as they fit the dense path and GroMo."""
    work = bench.channels**2 * bench.image**2 * bench.batch
    repeats = 15 if work < 2e9 else 7 if bench.channels < 512 else 4
    update = measure_update(bench)
    bench.train_step()
    update()
    steps, updates = [], []
    for _ in range(repeats):
        steps.append(bench.timed(bench.train_step))
        updates.append(update()[0])
    result: dict[str, Any] = {"step": median(steps), "ours": median(updates), "repeats": repeats}
    collector = bench.collector()
    with collector:
        bench.train_step()
    result["finish"] = bench.timed(lambda: _finish(collector))
    result["second pass"] = collector.needs_second_pass
    result["paths"] = collector.explain()
    for name, maker in (
        ("dense", lambda: lambda: measure_update(bench, "dense")()[0]),
        ("gromo", lambda: gromo_update(bench)),
    ):
        if not bench.compared:
            continue
        try:
            other = maker()
            result[name] = median([other() for _ in range(3 if bench.image < 64 else 1)])
        except ImportError:
            continue
    return result


def _finish(collector: StatisticsCollector) -> Tensor | None:
    """Expand the sums, solve for W* and project, once per collection."""
    consumer = next(iter(collector.statistics.values())).consumer
    return consumer.update if consumer.pending else consumer.N


def task_memory(bench: Bench, method: str) -> dict[str, Any]:
    """Peak memory of one method on one batch, finishing included."""
    bench.train_step()
    update = gromo_update(bench) if method == "gromo" else None

    def run() -> None:
        if update is not None:
            update()
            return
        collector = bench.collector("dense" if method == "dense" else "auto")
        with collector:
            bench.train_step()
        if collector.needs_second_pass:
            with collector.second_pass():
                bench.train_step()
        _finish(collector)

    return {"peak": peak_bytes(bench, run)}


def row(shape: str, device: str, threads: int) -> tuple[list[str], list[str]]:
    """One row of the table, and what there is to say about it."""
    times = run_child("times", shape, device, threads)
    if "failed" in times:
        return [*shape.split("x"), "failed", *[""] * (len(COLUMNS) - 4)], [f"{shape}: {times['failed'][0]}"]
    memory = {"ours": run_child("memory-ours", shape, device, threads).get("peak")}
    for method in ("dense", "gromo"):
        memory[method] = run_child(f"memory-{method}", shape, device, threads).get("peak") if method in times else None
    ratio_target, peer_target, memory_target = TARGETS[shape]
    ratio = times["ours"] / times["step"]
    channels, image, batch = shape.split("x")
    cells = [channels, f"{image}²", batch, f"{1e3 * times['step']:.1f}", f"{1e3 * times['ours']:.1f}", f"{ratio:.2f}"]
    cells += [f"≤ {ratio_target:g}", f"{1e3 * times['finish']:.0f}", _megabytes(memory["ours"]), f"≤ {memory_target}"]
    for method in ("dense", "gromo"):
        cells.append(f"{times[method] / times['ours']:.0f}" if method in times else "–")
        if method == "gromo":
            cells.append(f"≥ {peer_target:g}" if peer_target else "–")
        cells.append(_megabytes(memory[method]))
    notes = []
    misses = _misses(times, memory, ratio, shape)
    if misses:
        notes.append(f"{shape} misses: {'; '.join(misses)}.")
    if times["second pass"]:
        notes.append(
            f"{shape}: P does not fit into scratch_bytes, so N takes a second forward and backward pass, "
            "which is included."
        )
    return cells, notes


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.0f}"


def _misses(times: dict[str, Any], memory: dict[str, int | None], ratio: float, shape: str) -> list[str]:
    """Which targets a row does not meet, and by how much."""
    ratio_target, peer_target, memory_target = TARGETS[shape]
    misses = []
    if ratio > ratio_target:
        misses.append(f"{ratio:.2f} times forward+backward instead of {ratio_target:g}")
    if peer_target and "gromo" in times and times["gromo"] / times["ours"] < peer_target:
        misses.append(f"{times['gromo'] / times['ours']:.0f} times faster than GroMo instead of {peer_target:g}")
    limit = _memory_limit(memory_target, memory["gromo"])
    if memory["ours"] is not None and limit is not None and memory["ours"] > limit:
        misses.append(f"{_megabytes(memory['ours'])} MB instead of {limit / 1e6:.0f}")
    return misses


def _memory_limit(target: str, gromo: int | None) -> float | None:
    if target.endswith("GB"):
        return 1e9 * float(target.split()[0])
    share = {"¼": 0.25, "1/10": 0.1}[target.split()[0]]
    return None if gromo is None else share * gromo


def main() -> None:
    """Run the table, or one task of it."""
    parser = argparse.ArgumentParser(description="Cost of the statistics of a pair of convolutions.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        bench = Bench(options.shape[0], options.device)
        task = options.task
        print(json.dumps(task_times(bench) if task == "times" else task_memory(bench, task.removeprefix("memory-"))))
        return
    rows, notes = [], [
        "All statistics are S, S2, M and N, for one more batch of a pair of 3×3 convolutions with padding 1, biases "
        "and a ReLU in between, in float32. Forward+backward is that of the pair alone, without gradients of the "
        "images. Finish: expanding the sums, solving for W* and projecting, once per collection. Peak memory is "
        "what is added to the memory that the process held before, including the finish. –: not tried, because it "
        "would take gigabytes or minutes, or because the bench extra is not installed."
    ]  # fmt: skip
    name = "statistics" if options.device == "cpu" else f"statistics-{options.device}"
    command = "python -m experiments.benchmarks.statistics"
    command += "" if options.device == "cpu" else f" --device {options.device}"
    title = "Statistics of a pair of convolutions" + ("" if options.device == "cpu" else f", on {options.device}")
    for shape in options.shape or SHAPES:
        cells, remarks = row(shape, options.device, options.threads)
        print(" | ".join(cells), *remarks, sep="\n", flush=True)
        rows.append(cells)
        notes += remarks
        if not options.no_write:  # after every row: a run that is cut short leaves what it has
            write_section(name, title, command, COLUMNS, rows, notes, packages=("gromo",))


if __name__ == "__main__":
    main()

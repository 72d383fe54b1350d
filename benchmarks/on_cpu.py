"""What benchmarks of modules on a CPU share: options, and what bounds them, the bandwidth of a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench
from benchmarks.attention_decode import copy_bandwidth
from forwardpass.common import environment
from forwardpass.common.timing import keep_freed_memory


def begin(
    doc: str | None, schema: str, add_options: Callable[[argparse.ArgumentParser], object]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(the options, the head of the result), `copy_gb_per_s` included; it is printed too."""
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    add_options(p)
    p.add_argument("--threads", type=int, help="torch's own number by default")
    p.add_argument("--rounds", type=int, default=15, help="timed samples of each candidate")
    p.add_argument("--json", metavar="FILE", help="also write the result to this file")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = bench.header(schema, "cpu", ["copy_gb_per_s", "results"])
    result |= {"allocator": keep_freed_memory(), "threads": torch.get_num_threads(), "tier": environment.cpu_tier()}
    result["copy_gb_per_s"] = copy_bandwidth(args.rounds) / 1e9
    print(f"{result['device']['name']}, {result['tier']}, {result['threads']} threads; "
          f"copy: {result['copy_gb_per_s']:.1f} GB/s, read and written")  # fmt: skip
    result["results"] = []
    return args, result


def of_copy(timing: dict[str, Any], result: dict[str, Any]) -> float:
    """The share of that bandwidth that a timing's `bytes` make, also put into it."""
    timing["of_copy"] = share = timing["bytes"] / timing["median"] / 1e6 / result["copy_gb_per_s"]
    return float(share)

"""The nodes of a Ray cluster: joining one, and what a worker can ask of it.

Input: a device, a number of workers. Output: a connection, and resources in Ray's terms.
Invariants: a cluster that is started here listens on no address that other machines can reach.
"""

import logging
import os
import warnings
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports to its developers

import ray

from ..errors import ConfigError


def join_cluster() -> None:
    """Join the cluster of this host or the one that RAY_ADDRESS names, else start one here.

    Raises:
        ConfigError: no cluster answers at RAY_ADDRESS.
    """
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    named = os.environ.get("RAY_ADDRESS")
    # What Ray starts is executed at once: nothing of LanceDB lives on in it.
    for complaint in ("lancedb fork support", "lance is not fork-safe"):
        warnings.filterwarnings("ignore", complaint)
    try:
        ray.init(address="auto", **quiet)  # RAY_ADDRESS, or the cluster that this host is in
    except ConnectionError as error:
        if named and named != "local":
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS {named}; start it with `ray start`, or "
                "unset RAY_ADDRESS to use this machine alone"
            ) from error
        # For this machine only: it listens on no address that others could reach.
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)


def find_resources(device: str, count: int | None) -> tuple[str, dict[str, Any], int, int]:
    """Kind of device, what a worker asks of Ray, its threads, and how many workers there can be.

    Raises:
        ConfigError: the cluster has no such device.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("TPU", "GPU", "CPU")}
    if device == "auto":
        device = "xla" if total["TPU"] else "cuda" if total["GPU"] else "cpu"
    if device == "xla" and total["TPU"]:
        chips = max(int(node.get("TPU", 0)) for node in nodes)
        hosts = [node for node in nodes if node.get("TPU", 0) == chips]
        cpus = min(int(node.get("CPU", 1)) for node in hosts)
        return device, {"num_cpus": 1, "resources": {"TPU": chips}}, max(1, cpus - 1), len(hosts)
    if device == "xla" and os.environ.get("PJRT_DEVICE", "").upper() != "CPU":
        raise ConfigError(
            f"device is xla, and the cluster's {len(nodes)} nodes have no TPU; wait until "
            "a TPU host has joined, or use --device auto"
        )
    if device == "cuda":
        if not total["GPU"]:
            raise ConfigError(
                f"device is cuda, and the cluster's {len(nodes)} nodes have no GPU; use --device "
                "cpu or start the nodes with --num-gpus"
            )
        gpus = int(total["GPU"])
        threads = max(1, int(total["CPU"]) // max(gpus, count or gpus))
        return device, {"num_cpus": 1, "num_gpus": 1}, threads, gpus
    # A CPU, or XLA on one: a host's cores are divided among the workers that it gets.
    hosts = [node for node in nodes if node.get("CPU", 0) >= 1]
    if not hosts:
        raise ConfigError("the cluster has no free CPU; start its nodes with --num-cpus")
    cores = min(int(node["CPU"]) for node in hosts)
    share = max(1, cores // -(-(count or len(hosts)) // len(hosts)))
    return device, {"num_cpus": share}, share, len(hosts)

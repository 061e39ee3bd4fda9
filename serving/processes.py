"""The processes that run one engine together, and how they find each other."""

from __future__ import annotations

import dataclasses

from paddock.sharding import MeshConfig

from .engine_config import EngineConfig

# How long processes wait for each other while they start.
START_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Processes:
    """`count` processes, of which this is number `index`. `coordinator` is host:port of JAX's service in process 0;
    turns are told on `broadcast_port` of the same host."""

    count: int
    index: int
    coordinator: str
    broadcast_port: int

    @classmethod
    def of(cls, config: EngineConfig) -> Processes | None:
        """None: this process is alone. Raises ValueError naming the option that is wrong or missing."""
        address, count, index = config.coordinator_address, config.num_processes, config.process_id
        if not address:
            given = next((name for name in ("num_processes", "process_id") if getattr(config, name) is not None), None)
            if given is None or (count == 1 and not index):
                return None
            raise ValueError(f"{given} is given but no coordinator_address: host:port in process 0, or 'auto'")
        if address == "auto":
            address, count, index = _ask_cluster(count, index)
        if count is None or index is None:
            raise ValueError("coordinator_address needs num_processes and process_id, too")
        if index >= count:
            raise ValueError(f"process_id {index} is not below num_processes {count}")
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(f"coordinator_address must be host:port, got {address!r}")
        if count == 1:
            return None
        if MeshConfig.parse(config.layout_text.mesh).num_replicas > 1:
            raise ValueError(
                "mesh: an axis data in several processes is not supported; start a server for each replica"
            )
        # Slurm's ports reach up to the last one there is.
        beside = int(port) + 1 if int(port) < 2**16 - 1 else int(port) - 1
        return cls(count, index, address, config.broadcast_port or beside)

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    def join(self, heartbeat_seconds: int) -> None:
        """Make JAX see the devices of all processes. Before anything else uses JAX.

        JAX ends this process by SIGABRT when another has been silent for twice `heartbeat_seconds`: should it hang so
        badly that `broadcast` cannot end it with a word to its clients.
        """
        import jax  # not before it is needed: a follower with wrong options ends without

        # It would take SIGTERM for itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            self.coordinator,
            self.count,
            self.index,
            coordinator_bind_address=self.coordinator,
            # Which devices a process sees is for CUDA_VISIBLE_DEVICES or Slurm to say, not for JAX to guess.
            cluster_detection_method="deactivate",
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=2 * heartbeat_seconds,
        )

    def leave(self) -> None:
        """The orderly end; waits for the others to do the same."""
        import jax

        jax.distributed.shutdown()


def _ask_cluster(count: int | None, index: int | None) -> tuple[str, int, int]:
    """Address, count and index as the cluster's scheduler says. Raises ValueError when there is none."""
    from jax._src import clusters  # what jax.distributed.initialize asks, too; we must know before it runs

    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, count, index, _ = find(None, count, index, None, None, START_SECONDS)
    if address is None or count is None or index is None:
        raise ValueError("coordinator_address is auto, but this is neither Slurm nor Open MPI: give host:port")
    return address, count, index

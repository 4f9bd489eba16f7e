"""Names of the environment variables that a Holdfast agent adds to torchrun's own for each rank."""

from typing import Final

JOB: Final = "HOLDFAST_JOB"  # job id; names the abstract sockets
TOKEN: Final = "HOLDFAST_TOKEN"  # every gRPC call carries it
AGENT: Final = "HOLDFAST_AGENT"  # abstract unix socket of the host's agent, without the leading NUL
SMP: Final = "HOLDFAST_SMP"  # abstract unix socket of the host's snapshot manager, without the NUL
COORDINATOR: Final = "HOLDFAST_COORDINATOR"  # host:port at the time of the spawn; the agent tells of changes
INCARNATION: Final = "HOLDFAST_INCARNATION"
FAULTS: Final = "HOLDFAST_FAULTS"  # scripted faults, see proto/faults.py
RUN_DIR: Final = "HOLDFAST_RUN_DIR"  # where the event record lies
ADDRESS: Final = "HOLDFAST_ADDRESS"  # where ranks of other hosts reach this host
HOST: Final = "HOLDFAST_HOST"  # number of the host in the job
SAVER: Final = "HOLDFAST_SAVER"  # file of the page that ranks share with the saver; unset: none
CHECKPOINTS: Final = "HOLDFAST_CHECKPOINTS"  # folder of the job's checkpoints
RESUME: Final = "HOLDFAST_RESUME"  # checkpoint that the job started from
PROTECTOR: Final = "HOLDFAST_PROTECTOR"  # abstract unix socket of the host's protector; unset: none
ZERO: Final = "HOLDFAST_ZERO"  # 0 or 1: optimizer state sharded over replicas; unset: as the script says
RECOVERY: Final = "HOLDFAST_RECOVERY"  # how lost state is made up for, see runtime/recovery/ladder.py; unset: exact
SNAPSHOT_EVERY: Final = "HOLDFAST_SNAPSHOT_EVERY"  # steps between snapshots; unset: as the script says
SNAPSHOTS: Final = "HOLDFAST_SNAPSHOTS"  # "off": no snapshots in memory

"""Which part of its machine a training process may use. Nothing slow is imported here."""

import os


def local_place() -> tuple[int, int]:
    """This process's number among the training processes of its machine (0-based), and how many they are, as torchrun
    or torch_xla.launch says in the environment; (0, 1) without either."""
    for number, count in (("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("PJRT_LOCAL_PROCESS_RANK", "PJRT_LOCAL_PROCESS_COUNT")):
        if count in os.environ:
            return int(os.environ.get(number, 0)), int(os.environ[count])
    return 0, 1


def own_cores() -> int:
    """CPU cores that this process may use, shared equally with the machine's other training processes; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_place()[1])

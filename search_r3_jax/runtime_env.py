"""Environment variables of the libraries: quiet, and fast on a CPU. Call before importing them."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

# Defaults of XLA for CPUs that are changed; other back-ends ignore these flags.
CPU_FLAGS = {
    # Independent operations run concurrently. On few cores they evict each other's caches: a decode step took
    # 1.3 to 1.6 times as long.
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    # Matrix products with what surrounds them run in YNNPACK: a training step took 1.09 times as long.
    "--xla_cpu_experimental_ynn_fusion_type": "",
}


def configure_libraries() -> None:
    """Silence the chatter of all libraries, for a process that is ours; errors still come through."""
    configure_environment()
    for name in ("absl", "jax", "orbax", "grain", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(orbax|grain|tensorflow_datasets|flax|jax|google)\b.*")


def configure_environment() -> None:
    """Silence what XLA, tokenizers and transformers say when they start, and set XLA's flags for CPUs.

    What the user has set stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"{flag}={value}" for flag, value in CPU_FLAGS.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*([flags] if flags else []), *missing])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Without a TPU, as for plans, the TPU compiler would query the machine for one and print warnings.
    if not any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio")):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # Send no usage data to the hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

"""One experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from search_r3_jax.config.data import DataConfig, TextConfig
from search_r3_jax.config.index import IndexConfig
from search_r3_jax.config.mesh import MeshConfig
from search_r3_jax.config.model import LoraConfig
from search_r3_jax.config.rl import RlConfig
from search_r3_jax.config.sft import SftConfig

Step = int | Literal["best"] | None
"""A checkpoint of a run: its step, the best on the development queries, or None for the newest."""
TrackerName = Literal["tensorboard", "wandb", "none"]
"""What shows a run beside its own files; no setting, because it decides nothing that a run computes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment: everything that decides what a run computes.

    Attributes:
        model: Model to start from: a Hugging Face folder or id, a GGUF file, `smollm2`
            (SmolLM2-135M-Instruct, as installed), or a run folder.
        start_step: Where the model is a run: which checkpoint, a step or `best`. None: the newest.
        seed: Seed of batches, dropout and sampling.
        compute_dtype: Precision of the forward and backward pass. Parameters stay float32.
        remat: What the forward pass keeps of a layer for the backward pass: `none` recomputes nothing, `dots`
            keeps matrix products, `offload` keeps inputs in host memory, `full` keeps inputs on the device.
        attention: `splash` is the TPU kernel; off a TPU it is interpreted, slowly. `xla` runs anywhere.
        data: Data sets.
        text: How texts become tokens.
        lora: Adapters.
        sft: Stage 1.
        rl: Stage 2.
        index: The index of stage 2.
        mesh: Devices of training.
    """

    model: str = "smollm2"
    start_step: Step = None
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "dots", "offload", "full"] = "full"
    attention: Literal["xla", "splash"] = "xla"
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

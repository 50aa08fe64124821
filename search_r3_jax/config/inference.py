"""Precision and devices of a model that is used and not trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from search_r3_jax.config.mesh import MeshConfig


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Precision and devices of a model that is used and not trained.

    Attributes:
        param_dtype: Precision of the model's matrices in memory. bfloat16 halves their size.
        compute_dtype: Precision of activations.
        mesh: Devices that share the weights and the texts; by default all that there are.
    """

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def reduced_precision(self) -> dict[str, str]:
        """The precisions that are not float32, by setting: with these other documents are found."""
        named = {"param_dtype": self.param_dtype, "compute_dtype": self.compute_dtype}
        return {name: dtype for name, dtype in named.items() if dtype != "float32"}

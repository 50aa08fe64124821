"""MTEB's encoder protocol over an `Embedder`; only queries may be reasoned about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from search_r3_jax.config import InferenceConfig, Step
from search_r3_jax.data.collection import Document
from search_r3_jax.embedder import MAX_THINK_TOKENS, Embedder
from search_r3_jax.files import digest_of
from search_r3_jax.mesh import mesh_from_config
from search_r3_jax.text.prompts import Mode


class MtebEncoder(AbsEncoder):
    """A model of this package for `mteb.evaluate`.

    Attributes:
        model: the `Embedder`.
        mteb_model_meta: name, revision (a hash of parameters, config, tokenizer and prompts) and the
            encoder's settings. MTEB keeps results by these.
        model_prompts: text before a text, by MTEB's names: a task or a type of tasks, with or without -query
            or -document.
    """

    model: Embedder

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        step: Step = None,
        mode: Mode = "direct",
        max_tokens: int | None = None,
        max_think_tokens: int = MAX_THINK_TOKENS,
        prompts: Mapping[str, str] | None = None,
        instruction_template: str | None = None,
        inference: InferenceConfig | None = None,
    ):
        """Open whatever `Embedder.load` opens; raises UserError when it cannot be read.

        `mode` is that of queries. `instruction_template` puts a task's instruction before its queries, as in
        "Instruct: {instruction}\\nQuery: ". The protocol also passes `revision` and `device`; both are
        ignored: the model's content defines the revision, and JAX chooses devices.
        """
        inference = inference or InferenceConfig()
        self.model = Embedder.load(
            model_name,
            step=step,
            max_tokens=max_tokens,
            max_think_tokens=max_think_tokens,
            param_dtype=inference.param_dtype,
            compute_dtype=inference.compute_dtype,
            mesh=mesh_from_config(inference.mesh),
        )
        self._mode: Mode = mode
        self.model_prompts = self.validate_task_to_prompt_name(dict(prompts)) if prompts else None
        self.instruction_template = instruction_template
        settings = self._settings(max_think_tokens, inference.reduced_precision())
        self.mteb_model_meta = self._meta(model_name, settings)

    def _settings(self, max_think_tokens: int, precision: Mapping[str, str]) -> dict[str, Any]:
        """The settings that vectors depend on, and a hash of them."""
        settings: dict[str, Any] = {"mode": self._mode, "max_tokens": self.model.max_tokens}
        given = {
            "max_think_tokens": max_think_tokens if self._mode == "reason" else None,
            **precision,
            "prompts": self.model_prompts,
            "instruction_template": self.instruction_template,
        }
        settings |= {name: value for name, value in given.items() if value is not None}
        # In a folder's name MTEB writes "_" for many characters: two templates could share one.
        settings["sha256"] = digest_of([json.dumps(settings, sort_keys=True)])[:12]
        return settings

    def _meta(self, model_name: str, settings: dict[str, Any]) -> ModelMeta:
        """What MTEB keeps results by: the model's name and content, and the settings of the encoder."""
        return ModelMeta(
            # MTEB cannot open this model by name.
            loader=None,
            name=mteb_name(model_name),
            revision=self.model.model_hash(),
            release_date=None,
            languages=None,
            n_parameters=self.model.parameters,
            memory_usage_mb=None,
            max_tokens=self.model.max_tokens,
            embed_dim=self.model.dimension,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=bool(self.model_prompts or self.instruction_template),
            training_datasets=None,
            experiment_kwargs=settings,
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Unit vectors [N,E] float32 of the batches' texts, in their order."""
        document = prompt_type is PromptType.document
        texts = [text for batch in inputs for text in (_documents(batch) if document else batch["text"])]
        before = self._before(task_metadata, prompt_type)
        return self.model.encode(
            [before + text for text in texts],
            kind="document" if document else "query",
            # Only queries are reasoned about, neither documents nor the texts of symmetric tasks.
            mode=self._mode if prompt_type is PromptType.query else "direct",
            progress=None if kwargs.get("show_progress_bar", True) else False,
        )

    def _before(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The text before every text of a task: a prompt, or for queries the task's instruction."""
        prompt = self.get_prompt_name(task, prompt_type)
        if prompt is not None and self.model_prompts is not None:
            return self.model_prompts[prompt]
        if self.instruction_template is None or prompt_type is PromptType.document:
            return ""
        return self.get_task_instruction(task, prompt_type)


def mteb_name(model: str) -> str:
    """A name with an organisation, as MTEB demands.

    A hub id stays as it is; of a folder the last two parts of its path are taken.
    """
    path = Path(model)
    if not path.exists():
        return model if "/" in model else f"search_r3_jax/{model}"
    path = path.resolve()
    return f"{path.parent.name or 'search_r3_jax'}/{path.name}"


def _documents(batch: Mapping[str, Any]) -> Sequence[str]:
    """Texts of documents; a title is a separate first line, as in training."""
    if "title" not in batch:
        return batch["text"]
    return [
        Document(doc_id="", title=title, text=text).body
        for title, text in zip(batch["title"], batch["body"], strict=True)
    ]

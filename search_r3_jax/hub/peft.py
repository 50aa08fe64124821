"""Export of adapters and the embed token's row for PEFT (`peft.PeftModel.from_pretrained`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import nnx

from search_r3_jax.config import Step
from search_r3_jax.errors import UserError
from search_r3_jax.files import write_json
from search_r3_jax.hub.checkpoint_reader import (
    read_checkpoint,
    read_run,
    resolve_step,
    starting_model,
    starting_step,
)
from search_r3_jax.hub.export import (
    EXPORT_MANIFEST,
    MAX_TOKENS,
    max_text_tokens,
    save_tensors,
    save_tokenizer,
    write_card,
    write_export_manifest,
)
from search_r3_jax.hub.folders import replaced_folder
from search_r3_jax.hub.load_model import LoadedModel, load_model, with_lora, with_recorded_prompts
from search_r3_jax.hub.model_card import adapter_card
from search_r3_jax.hub.model_facts import ModelFacts
from search_r3_jax.hub.model_names import is_hub_id
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.families import LAYER_TENSORS
from search_r3_jax.models.lora import trainable_filter

TOKEN_ROW = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class _Adapters:
    """Adapters of several targets: A [L,I,R] and B [L,R,O] float32; a kernel changes by A·B·scale."""

    rank: int
    alpha: float
    dropout: float
    factors: dict[str, tuple[np.ndarray, np.ndarray]]


def export_peft(
    model: LoadedModel,
    out: Path,
    *,
    base: str,
    earlier: Sequence[LoadedModel] = (),
    facts: ModelFacts | None = None,
) -> Path:
    """Write adapter weights and config, tokenizer, prompts and a model card atomically.

    `model` has unmerged adapters (`with_lora`); `base` is the name or folder of their checkpoint. `earlier`
    are previous stages, oldest first, whose merged result is the base of `model`: their adapters are added as
    further ranks, so that all load onto the first base. The card tells the `facts`. Raises UserError when
    there are no adapters.
    """
    decoder = model.decoder
    base, _, revision = base.partition("@") if is_hub_id(base) else (base, "", "")
    if decoder.lora is None or decoder.embed_row is None:
        raise UserError(f"{base}: lora.rank: the model has no adapters of its own; export it without --peft")
    adapters = _adapters_of(decoder)
    for stage in reversed(earlier):
        adapters = _joined(_adapters_of(stage.decoder), adapters)
    rows = {"embed_tokens": np.asarray(decoder.embed_row[...])}
    tensors = _factor_tensors(adapters) | {
        f"base_model.model.model.embed_tokens.{TOKEN_ROW}": rows["embed_tokens"][None]
    }
    if decoder.head_row is not None:
        rows["lm_head"] = np.asarray(decoder.head_row[...])
        tensors[f"base_model.model.lm_head.{TOKEN_ROW}"] = rows["lm_head"][None]
    prompter = model.prompter()
    with replaced_folder(out, marker=EXPORT_MANIFEST) as folder:
        save_tensors(tensors, folder / "adapter_model.safetensors")
        write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "revision": revision or None,
                "inference_mode": True,
                "r": adapters.rank,
                "lora_alpha": adapters.alpha,
                "lora_dropout": adapters.dropout,
                "target_modules": [_torch_name(target).rsplit(".", 1)[1] for target in adapters.factors],
                "trainable_token_indices": {name: [model.embed_id] for name in rows},
                "bias": "none",
                "fan_in_fan_out": False,
                "use_rslora": False,
                "use_dora": False,
            },
        )
        save_tokenizer(model.tokenizer, folder)
        write_export_manifest(
            folder,
            model.embed_id,
            prompter.prompts,
            max_tokens=min(MAX_TOKENS, max_text_tokens(prompter, decoder.config.max_positions)),
        )
        facts = facts or ModelFacts()
        name = out.resolve().name
        card = adapter_card(prompter, facts, name=name, base=base, embed_id=model.embed_id)
        write_card(folder, card, facts)
    return out


def load_stages(run: Path, *, step: Step = None) -> tuple[list[LoadedModel], str]:
    """A run's model with unmerged adapters, after those of the runs it builds on; and their first base.

    Oldest first.

    `step` chooses a checkpoint of `run` (a number, `best`, None for the newest). Raises UserError when a run
    trained without adapters, or has no checkpoint.
    """
    config, run_json = read_run(run)
    if config.lora.rank == 0:
        raise UserError(
            f"{run / 'config.json'}: lora.rank: 0, so the run has no adapters; export it without --peft"
        )
    chosen = resolve_step(run, step)
    name, start_step = starting_model(run, run_json), starting_step(run_json)
    start = with_recorded_prompts(load_model(name, step=start_step), run, run_json)
    model = with_lora(start, config.lora, seed=config.seed)
    params = nnx.state(model.decoder, trainable_filter(model.decoder))
    nnx.update(model.decoder, read_checkpoint(run, chosen, params))
    if (Path(name) / "checkpoints").is_dir():
        earlier, first = load_stages(Path(name), step=start_step)
        return [*earlier, model], first
    return [model], name


def _adapters_of(decoder: Decoder) -> _Adapters:
    if decoder.lora is None:
        raise UserError("lora.rank: an earlier stage has no adapters; export the model without --peft")
    factors = {}
    for target in decoder.lora.targets:
        linear = getattr(decoder.layers, target)
        factors[target] = np.asarray(linear.lora_a[...]), np.asarray(linear.lora_b[...])
    return _Adapters(
        rank=decoder.lora.rank, alpha=decoder.lora.alpha, dropout=decoder.lora.dropout, factors=factors
    )


def _joined(first: _Adapters, second: _Adapters) -> _Adapters:
    """One adapter for the sum of two updates: ranks concatenated, each scale folded into its B.

    A target that one of them lacks is zero there.
    """
    rank = first.rank + second.rank
    factors = {}
    for target in {**first.factors, **second.factors}:
        a, b = (second.factors if target in second.factors else first.factors)[target]
        a_lir = np.zeros((a.shape[0], a.shape[1], rank), np.float32)
        b_lro = np.zeros((b.shape[0], rank, b.shape[2]), np.float32)
        for adapters, ranks in ((first, slice(0, first.rank)), (second, slice(first.rank, rank))):
            if target in adapters.factors:
                a_lir[:, :, ranks] = adapters.factors[target][0]
                b_lro[:, ranks] = adapters.factors[target][1] * np.float32(adapters.alpha / adapters.rank)
        factors[target] = a_lir, b_lro
    return _Adapters(rank=rank, alpha=float(rank), dropout=second.dropout, factors=factors)


def _factor_tensors(adapters: _Adapters) -> dict[str, np.ndarray]:
    tensors = {}
    for target, (a_lir, b_lro) in adapters.factors.items():
        for i in range(a_lir.shape[0]):
            name = f"base_model.model.model.layers.{i}.{_torch_name(target)}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a_lir[i].T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b_lro[i].T)
    return tensors


def _torch_name(target: str) -> str:
    """`self_attn.q_proj` for `q`."""
    return LAYER_TENSORS[target, "kernel"][0].removesuffix(".weight")

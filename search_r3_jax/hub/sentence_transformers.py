"""Files that make a Hugging Face folder a sentence-transformers model with our prompt and pooling."""

from __future__ import annotations

import json
from pathlib import Path

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.files import write_json
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, Prompter

REQUIRED = ">=6.2"
# Texts that begin and end with every kind of character that a tokenizer may join to the prompt around it.
_PROBES = ("", "word", "Word", "7", ".", "(a)", "-x-", "é", "中文", "'s", "a.\nb!")


def write_sentence_transformers(folder: Path, prompter: Prompter, *, dimension: int, max_tokens: int) -> bool:
    """Write the files into an exported folder; return whether the tokenizer allows it.

    Returns False, and writes nothing, if the prompt's tokens cannot be separated from a text's. The
    Transformer module renders each text with its own chat template, which ends in the embed token. When it
    cuts a long text, it restores what the template wrote after it. The folder's chat template stays as it is.
    """
    if not _tokens_agree(prompter):
        return False
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    direct = prompter.direct
    # The embedding is the last token's state, so padding must be to the right as in training, whatever the
    # tokenizer says.
    processor = {
        "model_max_length": len(direct.prefix) + max_tokens + len(direct.suffix) + len(direct.closing),
        "padding_side": "right",
        "truncation_side": "right",
    }
    if prompter.tokenizer.pad_token is None:
        processor["pad_token"] = str(prompter.tokenizer.eos_token)
    template = {
        "chat_template": message_template(prompter),
        "restore_suffix": True,
        "sanitize_control_tokens": True,
    }
    modules = [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
        ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
    ]
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)],
    )
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": output, "message": output | {"format": "flat"}},
            "module_output_name": "token_embeddings",
            # Vectors are normalised in float32, whatever the weights are stored in.
            "model_kwargs": {"dtype": "float32"},
            "processor_kwargs": processor,
            "processing_kwargs": {"chat_template": template},
        },
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"embedding_dimension": dimension, "pooling_mode": "lasttoken", "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "requirements": {"sentence-transformers": REQUIRED},
            "prompts": {"query": DIRECT_SYSTEM, "document": DIRECT_SYSTEM},
            "default_prompt_name": "query",
            "similarity_fn_name": "cosine",
        },
    )
    return True


def message_template(prompter: Prompter) -> str:
    """A Jinja chat template that renders one text like `Prompter.direct_rows`.

    Any other system prompt is an error in the template.
    """
    before, after = prompter.prompts.direct
    refusal = f"this model was trained with one prompt, '{DIRECT_SYSTEM}': give no other"
    return (
        f"{{%- if messages[0].role == 'system' and messages[0].content != {_literal(DIRECT_SYSTEM)} -%}}"
        f"{{{{ raise_exception({_literal(refusal)}) }}}}"
        "{%- endif -%}"
        f"{{{{- {_literal(before)} ~ (messages[-1].content | trim | replace({_literal(EMBED_TOKEN)}, ''))"
        f" ~ {_literal(after + CLOSING)} -}}}}"
    )


def _literal(text: str) -> str:
    # Jinja reads JSON's escapes, but not its surrogate pairs.
    return json.dumps(text, ensure_ascii=False)


def _tokens_agree(prompter: Prompter) -> bool:
    """Whether a rendered prompt has the tokens of its three pieces.

    It may not if no special token separates them.
    """
    before, after = prompter.prompts.direct
    whole = prompter.tokenizer(
        [before + probe + after + CLOSING for probe in _PROBES], add_special_tokens=False
    )["input_ids"]
    pieces = [[*prompter.direct.prefix, *row] for row in prompter.direct_rows(_PROBES, 64)]
    return whole == pieces

"""The tokenizer of a checkpoint, with `<|embed_token|>` in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError

_ROW_MULTIPLE = 128
# The word pattern of Qwen2, from its published tokenizer.json.
_QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; raises UserError when there is none."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: tokenizer.json: missing; a checkpoint needs its tokenizer beside the weights")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: tokenizer.json: cannot be read ({reason}); download it again") from None


def tokenizer_from_gguf(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from the fields of a GGUF file (`GgufFile.tokenizer_fields`)."""
    tokens: list[str] = fields["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields["pre"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in fields["special"]])
    pad = fields["pad"] if fields["pad"] >= 0 else fields["eos"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokens[fields["eos"]],
        pad_token=tokens[pad],
        bos_token=tokens[fields["bos"]] if fields["bos"] >= 0 else None,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = fields["chat_template"] or None
    return fast


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name == "qwen2":
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name == "default":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    raise UserError(f"tokenizer.ggml.pre: {name!r} is not supported; use the Hugging Face folder of this model instead")


def add_embed_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, int]:
    """Give `<|embed_token|>` an id; returns `(embed_id, vocab_size)`, grown to a multiple of 128 where no padded row was free."""
    embed_id = tokenizer.get_vocab().get(EMBED_TOKEN)
    if embed_id is None:
        # Typed loosely: transformers declares its own stand-in for this class.
        token: Any = AddedToken(EMBED_TOKEN, normalized=False, special=True)
        tokenizer.add_tokens(token, special_tokens=True)
        embed_id = tokenizer.get_vocab()[EMBED_TOKEN]
    if embed_id >= vocab_size:
        vocab_size = -(-(embed_id + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return int(embed_id), vocab_size

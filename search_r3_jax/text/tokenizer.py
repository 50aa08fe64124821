"""The tokenizer of a checkpoint, with `<|embed_token|>` in it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.errors import UserError

_ROW_MULTIPLE = 128
# The word patterns of Qwen2 and Llama 3, from their published tokenizer.json.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RESERVED = re.compile(r"<\|?(?:reserved|unused)\w*\|?>")


class EmbedToken(NamedTuple):
    """Location of `<|embed_token|>`: its `tokenizer`, its id, and the `vocab_size` rows that hold it.

    `fresh`: the row did not belong to this token before.
    """

    tokenizer: PreTrainedTokenizerBase
    embed_id: int
    vocab_size: int
    fresh: bool


def tokenizer_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; raises UserError when there is none."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder}: tokenizer.json: missing; a checkpoint needs its tokenizer beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), config=_model_of(folder), local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises bare `Exception` for a file that it cannot read.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder}: tokenizer.json: cannot be read ({reason[:300]}); download it again"
        ) from None


def _model_of(folder: Path) -> PreTrainedConfig | None:
    """What chooses the class of a tokenizer in `config.json`; None without that file.

    The rest of the file is not checked here: a mistake in it is none of the tokenizer's.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(fields["model_type"], tokenizer_class=fields.get("tokenizer_class"))
    config.name_or_path = str(folder)
    return config


def tokenizer_from_gguf(fields: dict[str, Any], where: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from the fields of a GGUF file (`GgufFile.tokenizer_fields`).

    Raises UserError when the fields do not fit.
    """
    tokens: list[str] = fields["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    if not all(len(merge) == 2 and {*merge, "".join(merge)} <= vocabulary.keys() for merge in merges):
        raise UserError(
            f"{where}: tokenizer.ggml.merges: not pairs of the file's tokens; download the file again"
        )
    pre = fields["pre"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, where)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(tokens[i], normalized=False, special=True) for i in fields["special"]]
    )
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in fields["whole"]])
    pad = fields["pad"] if fields["pad"] >= 0 else fields["eos"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokens[fields["eos"]] if fields["eos"] >= 0 else None,
        pad_token=tokens[pad] if pad >= 0 else None,
        bos_token=tokens[fields["bos"]] if fields["bos"] >= 0 else None,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = fields["chat_template"] or None
    return fast


def _pre_tokenizer(name: str, where: str) -> pre_tokenizers.PreTokenizer:
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in ("qwen2", "llama-bpe"):
        pattern = _QWEN2_WORDS if name == "qwen2" else _LLAMA3_WORDS
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if name == "default":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    raise UserError(
        f"{where}: tokenizer.ggml.pre: {name!r} is not supported; use the Hugging Face folder of this model "
        "instead"
    )


def add_embed_token(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, where: str = "tokenizer"
) -> EmbedToken:
    """Give `<|embed_token|>` an id without growing the matrix where possible.

    Taken in this order: a padded row of the matrix, a reserved token's id, or new rows up to a multiple of
    128. Raises UserError, with `where` before it, when another token has no row of the matrix, and when the
    tokenizer's ids leave no room.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = [token for token, i in vocabulary.items() if i >= vocab_size and token != EMBED_TOKEN]
    if beyond:
        first = min(beyond, key=vocabulary.__getitem__)
        raise UserError(
            f"{where}: tokenizer: {first!r} has id {vocabulary[first]}, but the embedding table has "
            f"{vocab_size} rows; use the tokenizer of these weights, or resize the table for it"
        )
    if EMBED_TOKEN in vocabulary:
        embed_id = int(vocabulary[EMBED_TOKEN])
        return EmbedToken(tokenizer, embed_id, _rows(embed_id, vocab_size), False)
    if max(vocabulary.values()) + 1 >= vocab_size:
        reserved = _reserved_token(tokenizer)
        if reserved is not None:
            renamed = _renamed(tokenizer, reserved)
            return EmbedToken(renamed, int(vocabulary[reserved]), vocab_size, True)
    # Any: transformers declares a placeholder for this class.
    token: Any = AddedToken(EMBED_TOKEN, normalized=False, special=True)
    tokenizer.add_tokens(token, special_tokens=True)
    embed_id = int(tokenizer.get_vocab()[EMBED_TOKEN])
    if embed_id in vocabulary.values():
        raise UserError(
            f"{where}: {EMBED_TOKEN}: id {embed_id} is taken, for the ids have gaps; add the token to "
            "tokenizer.json by hand"
        )
    return EmbedToken(tokenizer, embed_id, _rows(embed_id, vocab_size), True)


def _rows(embed_id: int, vocab_size: int) -> int:
    return vocab_size if embed_id < vocab_size else -(-(embed_id + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _reserved_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first special token that its makers left free, such as Llama 3's `<|reserved_special_token_0|>`."""
    used = {
        str(token)
        for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    }
    template = str(tokenizer.chat_template or "")
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if (
            token.special
            and _RESERVED.fullmatch(token.content)
            and token.content not in used
            and token.content not in template
        ):
            return token.content
    return None


def _renamed(tokenizer: PreTrainedTokenizerBase, old: str) -> PreTrainedTokenizerBase:
    """The tokenizer with `old` called `<|embed_token|>`, under the same id: written out, changed in its
    files, and read again."""

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {rename(key): rename(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [rename(entry) for entry in value]
        return EMBED_TOKEN if value == old else value

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).glob("*.json"):
            file.write_text(
                json.dumps(rename(json.loads(file.read_text(encoding="utf-8"))), ensure_ascii=False),
                encoding="utf-8",
            )
        return tokenizer_from_folder(Path(folder))

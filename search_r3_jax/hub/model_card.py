"""Model cards (README.md) of exports: prompts, code that computes embeddings, base, data and scores."""

from __future__ import annotations

from search_r3_jax.config import EMBED_TOKEN
from search_r3_jax.hub.model_facts import ModelFacts, card_metadata, facts_section
from search_r3_jax.text.prompts import CLOSING, DIRECT_SYSTEM, REASON_SYSTEM, Prompter

# Names and numbers, which are the same in most languages: the model may know any.
_QUERIES = '["Johann Sebastian Bach", "Fibonacci"]'
_DOCUMENTS = '["BWV 988", "0, 1, 1, 2, 3, 5, 8, 13, 21, 34"]'

_PROMPTS = f"""# A search embedder that thinks first

The embedding of a text is the final hidden state at `{EMBED_TOKEN}`, normalised to length 1;
similarity is the cosine.

- direct: system `{DIRECT_SYSTEM}`, user: the text, assistant: `{CLOSING}`
- reasoned: system `{REASON_SYSTEM}`, user: the query, assistant: the model writes, and ends with `{CLOSING}`

Documents are embedded directly, queries either way.
"""

# What both snippets below do with a tokenizer, the model, and its decoder without the head.
_EMBED = """

def tokens(before, text, after):
    return tokenizer(before + text.strip() + after, return_tensors="pt", add_special_tokens=False)


def vector(input_ids):
    with torch.no_grad():
        state = decoder(input_ids=input_ids).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state.float(), dim=0)


def embed(text):
    return vector(tokens(direct[0], text, direct[1])["input_ids"])


def think(query, max_think_tokens=32):
    prompt = tokens(reasoned[0], query, reasoned[1])
    reply = model.generate(**prompt, max_new_tokens=max_think_tokens, do_sample=False, eos_token_id=ends)
    if reply[0, -1] != closing[-1]:  # the embed token
        reply = torch.cat([reply, torch.tensor([closing])], dim=1)
    return tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :]), vector(reply)


thought, query = think("Johann Sebastian Bach")
print(thought)
print(query @ embed("BWV 988"))
```

`embed` embeds directly, as documents are; `think` lets the model think about a query first.
Neither needs JAX.
"""

_TRANSFORMERS = """
## transformers

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
decoder = model.model

EMBED
Cut long texts before they go into the prompt, so that the embed token stays.
Special tokens written in a text are read as special tokens.
"""

_SENTENCE_TRANSFORMERS = f"""
## sentence-transformers

Version 6.2 or later.

```python
from sentence_transformers import SentenceTransformer

folder = "."  # the folder of this file
model = SentenceTransformer(folder)
queries = model.encode({_QUERIES}, prompt_name="query")
documents = model.encode({_DOCUMENTS}, prompt_name="document")
print(model.similarity(queries, documents))
```

A text that is too long is cut, never the prompt around it.
Special tokens written in a text are read as plain text, if split a little
otherwise than `Embedder` splits them. Embeddings are direct; for reasoned ones take `think` above,
or `Embedder`.
"""

_NO_SENTENCE_TRANSFORMERS = """
## sentence-transformers

This folder has no files for it: in this tokenizer the prompt and a text around it share tokens,
so the prompt cannot be added as text.
"""

_EMBEDDER = f"""
## search_r3_jax

```python
from search_r3_jax import Embedder

folder = "."  # the folder of this file
embedder = Embedder.load(folder)
queries = embedder.encode({_QUERIES}, kind="query", mode="reason")
documents = embedder.encode({_DOCUMENTS}, kind="document")
print(embedder.similarity(queries, documents))
print(embedder.think({_QUERIES})[0].text)
```
"""


def model_card(prompter: Prompter, facts: ModelFacts, *, name: str, sentence_transformers: bool) -> str:
    """The card of an exported model; `sentence_transformers` says whether the folder has the files for it."""
    metadata = card_metadata(
        facts, name=name, library="sentence-transformers" if sentence_transformers else "transformers"
    )
    transformers = _TRANSFORMERS.replace("EMBED", _embed_functions(prompter))
    second = _SENTENCE_TRANSFORMERS if sentence_transformers else _NO_SENTENCE_TRANSFORMERS
    return f"---\n{metadata}\n---\n\n{_PROMPTS}{transformers}{second}{_EMBEDDER}{facts_section(facts)}"


def _embed_functions(prompter: Prompter) -> str:
    # Written out: a chat template may render another prompt tomorrow.
    (before, after), reasoned = prompter.prompts.direct, prompter.prompts.reason
    ends = [*prompter.end_ids, prompter.embed_id]
    return (
        f"direct = {before!r}, {after + CLOSING!r}\n"
        f"reasoned = {reasoned.before!r}, {reasoned.after!r}\n"
        f"# Tokens: what a thought that found no end is closed with, and where a reply ends.\n"
        f"closing, ends = {list(prompter.reason.closing)}, {ends}\n{_EMBED}"
    )


def adapter_card(prompter: Prompter, facts: ModelFacts, *, name: str, base: str, embed_id: int) -> str:
    """The card of exported adapters for the checkpoint that `base` names."""
    return f"""---
{card_metadata(facts, name=name, library="peft")}
---

{_PROMPTS}
## peft

The adapters bring the row of `{EMBED_TOKEN}` with them.
A base whose vocabulary ends before that row is grown first, as below.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.float32)
if base.get_input_embeddings().num_embeddings <= {embed_id}:
    base.resize_token_embeddings({embed_id + 1}, mean_resizing=False)
model = PeftModel.from_pretrained(base, folder).eval()
decoder = model.get_base_model().model

{_embed_functions(prompter)}{facts_section(facts)}"""

"""trl's side of `rl_step.py`: GRPOTrainer with a reward function that does what our environment does, through
torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import sides
from sides import Clock


class TorchIndex:
    """Exact search through torch; implements `Index`."""

    kind: str = "exact"
    version: int = 0

    def __init__(self, vectors: np.ndarray) -> None:
        import torch

        from search_r3_jax.retrieval.index.protocol import hash_of_ids

        self.shape: tuple[int, int] = (len(vectors), vectors.shape[1])
        self.ids_hash: str = hash_of_ids([str(row) for row in range(len(vectors))])
        self._vectors = vectors
        self._corpus = torch.from_numpy(vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        scores, rows = torch.topk(torch.from_numpy(queries) @ self._corpus.T, k)
        return scores.numpy(), rows.numpy().astype(np.int32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._vectors[rows]


def trl_steps(given: dict[str, Any]) -> None:
    """GRPOTrainer's own loop; it waits before every step but the first until it is told."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from search_r3_jax.retrieval.environment.environment import Environment
    from search_r3_jax.text.prompts import Prompter

    Q, G, rows = given["queries"], given["group"], given["trl_rows"]
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    prompter = Prompter(tokenizer)
    before, after = prompter.prompts.reason
    clock, answer, told = Clock(), {}, sides.numbers()

    def vectors_of(rows_ids: list[list[int]], at_a_time: int) -> np.ndarray:
        """Unit vectors [N,E] of the last token's state of each row."""
        decoder = trainer.model.get_base_model().model
        found = []
        with torch.inference_mode():
            for first in range(0, len(rows_ids), at_a_time):
                part = rows_ids[first : first + at_a_time]
                lengths = torch.tensor([len(row) for row in part])
                longest = int(lengths.max())
                ids = torch.tensor([row + [0] * (longest - len(row)) for row in part])
                mask = (torch.arange(longest)[None] < lengths[:, None]).long()
                states = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                found.append(
                    torch.nn.functional.normalize(states[torch.arange(len(part)), lengths - 1], dim=-1)
                )
        return torch.cat(found).numpy()

    def encode_documents(documents: np.ndarray) -> np.ndarray:
        texts = [given["bodies"][row] for row in documents]
        found = [
            [*prompter.direct.prefix, *row] for row in prompter.direct_rows(texts, given["document_tokens"])
        ]
        return vectors_of(found, given["torch_documents"])

    environment = Environment(
        TorchIndex(given["vectors"]),
        encode_documents,
        candidates=given["candidates"],
        refresh_budget=given["refresh"],
    )

    def retrieval(
        prompts: list[str], completion_ids: list[list[int]], positive: list[int], **_: Any
    ) -> list[float | None]:
        nonlocal answer
        prompt_ids = tokenizer(text=prompts)["input_ids"]
        replies = [
            [*p, *c, *prompter.reason.closing] for p, c in zip(prompt_ids, completion_ids, strict=True)
        ]
        vectors = vectors_of(replies, rows).reshape(Q, G, -1)
        result = environment.score(
            trainer.state.global_step, [{row: 1.0} for row in positive[::G]], vectors, np.ones((Q, G), bool)
        )
        written = float(np.mean([len(row) for row in completion_ids]))
        answer = {
            "reply_tokens": written,
            "mean_reward": float(result.rewards.mean()),
            "reencoded": result.stats["reencoded"],
        }
        return result.rewards.reshape(-1).tolist()

    class Timed(GRPOTrainer):
        """Ends the rollout where generation ends and the reward where rewards are there."""

        def _generate(self, prompts: list[Any]) -> Any:
            generated = super()._generate(prompts)
            clock.lap("rollout")
            return generated

        def _calculate_rewards(self, *arguments: Any) -> Any:
            # The reference's log-probabilities come between generation and reward.
            clock.lap("update")
            rewards = super()._calculate_rewards(*arguments)
            clock.lap("reward")
            return rewards

    class Turns(TrainerCallback):
        """Waits for a step's number before it, and answers behind it."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal clock
            if state.global_step > 0 and next(told, None) is None:
                sys.exit()
            clock = Clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.lap("update")
            if state.global_step > 1:
                sides.answer(clock.spent | answer)

    # One more than is asked for: the loop must be alive to be dismissed.
    count = given["steps"] + 2
    texts, positives = (given[name] + given[name][:Q] for name in ("texts", "positives"))
    prompts = [before + text + after for text in texts]
    for prompt, row in zip(prompts, prompter.reason_rows(texts, given["query_tokens"]), strict=True):
        assert tokenizer(text=prompt)["input_ids"] == [*prompter.reason.prefix, *row], (
            f"trl reads another prompt: {prompt}"
        )
    trainer: Any = Timed(
        model=AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32),
        reward_funcs=retrieval,
        args=GRPOConfig(
            output_dir=str(Path(given["model"]).parent / "trl"),
            use_cpu=True,
            bf16=False,
            max_steps=count,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=Q * G // rows,
            gradient_checkpointing=given["trl_checkpointing"],
            num_generations=G,
            num_iterations=1,
            max_completion_length=given["new_tokens"],
            generation_kwargs={"min_new_tokens": given["new_tokens"]},
            temperature=given["temperature"],
            top_k=0,
            beta=given["beta"],
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=given["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts, "positive": positives}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=given["lora_rank"],
            lora_alpha=given["lora_alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Turns()],
    )
    trainer.train()

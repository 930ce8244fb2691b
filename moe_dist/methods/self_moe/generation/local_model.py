"""Generation by a transformers model, whole on this rank: left padding, KV cache, transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from moe_dist.checkpoint.fingerprint import fingerprint
from moe_dist.data.encode import tokenizer_hash
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.backend import Completion, Sampling
from moe_dist.models.loading import load_model, resolve_folder
from moe_dist.parallel.grid import Grid


class LocalModel:
    """A `Backend`: any causal language model that `load_model` reads, in a folder or under a hub name.

    marks: whether the tokenizer adds its begin mark to a prompt; not to one that a chat template has made.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | None = None,
        dtype: str | None = None,
        device: torch.device,
        marks: bool = True,
    ):
        from transformers import AutoTokenizer

        folder = resolve_folder(model)
        self.model = load_model(folder, Grid.single(device), dtype=dtype, dense=True)
        if not self.model.can_generate():
            raise UserError(f"{model} is a {type(self.model).__name__}, which cannot generate text")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder, trust_remote_code=False)
        except Exception as error:  # the tokenizer classes raise many types
            raise UserError(f"no tokenizer can be loaded from {tokenizer or folder}: {error}") from None
        self.marks = marks
        self.ends = _end_tokens(self.model, self.tokenizer)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        # What a folder recommends for chats (a top-k, a penalty) has no part in how data is written.
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.identity = {
            "backend": "local",
            "model": fingerprint(folder),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "reproducible": True,
        }

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.encode(texts)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as a prompt: without an end mark, which some tokenizers put after every text."""
        options = {"add_special_tokens": self.marks, "return_attention_mask": False, "verbose": False}
        rows = self.tokenizer(list(texts), **options)["input_ids"]
        return [row[:-1] if row[-1:] == [self.tokenizer.eos_token_id] else row for row in rows]

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        seed: int,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[Completion]:
        ids_BL, mask_BL = self._padded(prompts)
        watch = _Watch(self.tokenizer, sampling.stop, self.ends, start=ids_BL.shape[1], on_tokens=on_tokens)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out_BL = self.model.generate(
                ids_BL,
                attention_mask=mask_BL,
                generation_config=self._config(sampling),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        rows = out_BL[:, ids_BL.shape[1] :].tolist()
        return [self._completion(row, end, sampling.stop) for row, end in zip(rows, watch.end_B.tolist(), strict=True)]

    def _padded(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids, attention mask), each int64 `[B,L]`, padded on the left."""
        rows = self.encode(prompts)
        longest = max(map(len, rows))
        ids_BL = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows])
        mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids_BL.to(self.model.device), mask_BL.to(self.model.device)

    def _config(self, sampling: Sampling) -> GenerationConfig:
        chosen = {"eos_token_id": self.ends, "pad_token_id": self.pad, "max_new_tokens": sampling.max_tokens}
        if sampling.temperature == 0:
            return GenerationConfig(do_sample=False, **chosen)
        # top_k: transformers' default of 50 would cut what top_p leaves.
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **chosen
        )

    def _completion(self, row: list[int], end: int, stop: Sequence[str]) -> Completion:
        finished = end >= 0
        row = row[:end] if finished else row
        text = self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        places = [place for place in map(text.find, stop) if place >= 0]
        return Completion(text[: min(places)] if places else text, finished, len(row))


class _Watch(StoppingCriteria):
    """Ends a row at an end-of-text token or where its text holds a stop string; all other rows go on.

    transformers' own criterion for stop strings prepares a table over the whole vocabulary for every tokenizer; looking
    at the last few tokens of each row is enough.
    end_B: int64, how many tokens a row has generated when it ended, -1 before.
    """

    def __init__(self, tokenizer, stop: Sequence[str], ends: Sequence[int], *, start: int, on_tokens):
        self.tokenizer, self.stop, self.start, self.on_tokens = tokenizer, stop, start, on_tokens
        self.ends, self.end_B = torch.tensor(ends), torch.empty(0, dtype=torch.int64)
        # A token holds at least a byte of a stop string; some more, as the first one may lose its leading space.
        self.window = max((len(text.encode("utf-8")) for text in stop), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if not len(self.end_B):
            self.end_B = torch.full((len(input_ids),), -1)
        length = input_ids.shape[1] - self.start
        live_B = self.end_B < 0
        self.on_tokens(int(live_B.sum()))
        tail = input_ids[:, self.start + max(0, length - self.window) :].cpu()
        ended_B = torch.isin(tail[:, -1], self.ends)
        if self.stop:
            texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            ended_B |= torch.tensor([any(stop in text for stop in self.stop) for text in texts])
        self.end_B[live_B & ended_B] = length
        return (self.end_B >= 0).to(input_ids.device)


def _end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a text: the model's, which may be several, and the tokenizer's."""
    given = model.generation_config.eos_token_id
    given = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    ends = sorted({*given, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    if not ends:
        raise UserError("neither the model nor its tokenizer names an end-of-text token, so no answer would ever end")
    return ends

"""What makes vectors of documents: the seed model, a sentence-embedding model, or vectors that somebody else made.

An embedder maps a document to a vector in float64. Documents go through one at a time, so that a vector depends on
nothing but its document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moe_dist.checkpoint import fingerprint
from moe_dist.data.encode import Encoder
from moe_dist.data.records import Record, RecordLog
from moe_dist.errors import UserError
from moe_dist.models.loading import resolve_folder
from moe_dist.models.nexus.configuration_nexus import CONFIGS
from moe_dist.models.skeleton import read_config


def tokenizer_of(place: str | Path):
    """The tokenizer in a folder or under a hub name; no code of it is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the tokenizer classes raise many types
        raise UserError(f"no tokenizer can be loaded from {place}: {error}") from None


class SeedEmbedder:
    """The seed model run over documents: its last hidden state, and what the MLP of each layer is fed.

    Both are means over a document's tokens. Raises UserError for a model whose MLPs cannot become experts.
    """

    def __init__(self, folder: str | Path, *, tokenizer: str | None, seq_len: int, device: torch.device):
        from transformers import AutoModelForCausalLM

        self.folder = resolve_folder(folder)
        config = read_config(self.folder)
        if config.model_type not in CONFIGS:
            raise UserError(f"{folder} is a {config.model_type}; dense families are {', '.join(CONFIGS)}")
        self.encoder = Encoder(tokenizer_of(tokenizer or self.folder))
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True).to(device).eval()
        self.seq_len, self.device = seq_len, device
        self.id = f"seed:{fingerprint(self.folder)}"
        self.layers = len(self.model.model.layers)
        self.hidden = config.hidden_size
        self._seen: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))

    @torch.no_grad()
    def run(self, record: Record, book: RecordLog) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(mean last hidden state `[H]`, mean MLP input of each layer `[L,H]`, its mean length `[L]`), float64.

        None for a document without a token, or one that `book` refuses.
        """
        encoded = next(self.encoder.encode([record], book), None)
        if encoded is None or len(encoded[0]) == 0:
            return None
        ids = torch.from_numpy(encoded[0][: self.seq_len].astype(np.int64)).to(self.device)
        self._seen.clear()
        hidden_TH = self.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        inputs_LTH = torch.stack([seen[0] for seen in self._seen]).double()
        return hidden_TH.double().mean(0).cpu(), inputs_LTH.mean(1).cpu(), inputs_LTH.norm(dim=2).mean(1).cpu()


class SentenceEmbedder:
    """A sentence-embedding model in HF format: the mean over the tokens of its last hidden state, at length one."""

    def __init__(self, folder: str | Path, *, device: torch.device):
        from transformers import AutoModel, AutoTokenizer

        self.folder, self.device = resolve_folder(folder), device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            self.model = AutoModel.from_pretrained(self.folder, local_files_only=True).to(device).eval()
        except Exception as error:  # whatever is wrong with such a folder
            raise UserError(f"nexus.embedder={folder}: no sentence-embedding model of transformers: {error}") from None
        self.id = f"sentence:{fingerprint(self.folder)}"
        longest = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.longest = min(self.tokenizer.model_max_length, longest)

    @torch.no_grad()
    def run(self, record: Record) -> torch.Tensor:
        """The vector `[m]` of a document, float64; a text beyond the model's window is cut."""
        text = record.text if record.text is not None else "\n".join(str(m.get("content")) for m in record.messages)
        inputs = self.tokenizer(text, truncation=True, max_length=self.longest, return_tensors="pt").to(self.device)
        vector_M = self.model(**inputs).last_hidden_state[0].double().mean(0)
        return (vector_M / vector_M.norm()).cpu()


def read_vectors(path: str | Path, names: Iterable[str]) -> tuple[str, Iterator[torch.Tensor]]:
    """(embedder id, the vectors `[documents, m]` of each name) of a file that somebody else made.

    A safetensors file: a tensor `[m]` or `[documents, m]` under each domain's name, and `embedder` in its metadata.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            embedder = (file.metadata() or {}).get("embedder")
            held = set(file.keys())
            missing = [name for name in names if name not in held]
            if missing:
                raise UserError(f"{path}: no vectors for {', '.join(missing)}")
            tensors = [torch.atleast_2d(file.get_tensor(name)).double() for name in names]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    if not embedder:
        raise UserError(f"{path}: its metadata has to say under 'embedder' what made the vectors")
    if any(t.dim() != 2 or t.shape[1] != tensors[0].shape[1] or not len(t) or not t.isfinite().all() for t in tensors):
        raise UserError(f"{path}: every domain needs finite vectors of one length, [m] or [documents, m]")
    return f"given:{embedder}", iter(tensors)

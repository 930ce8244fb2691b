"""Records to tokens: ids, and which of them carry loss."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from moe_dist.data.chat import encode_chat, resolve_template, template_hash
from moe_dist.data.records import Record, RecordLog
from moe_dist.errors import UserError

# Bumped when the same record would give other tokens or another loss mask.
ENCODER_VERSION = 2
# Texts handed to the tokenizer at once: it encodes them on all threads.
BATCH = 256


def tokenizer_hash(tokenizer) -> str:
    """Hex sha256 of what decides the tokens of a text: the whole fast tokenizer, or vocabulary and class."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # set by calls, not part of the tokenizer
        state.pop("padding", None)
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
    text = json.dumps([state, special], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class Encoder:
    """Tokenizer and chat template together.

    A text is encoded with the tokenizer's own special tokens (so with bos where it adds one) and ends with eos,
    exactly one; all its tokens carry loss. A conversation is what the chat template makes of it; the assistant's
    answers carry loss.
    """

    def __init__(self, tokenizer, *, chat_template: str | None = None):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token, which documents must end with")
        self.tokenizer = tokenizer
        self.template = resolve_template(tokenizer, chat_template)
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.identity = {
            "version": ENCODER_VERSION,
            "tokenizer": tokenizer_hash(tokenizer),
            "template": template_hash(self.template),
        }

    def encode(self, records: Iterable[Record], book: RecordLog) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids int32 [n], loss bool [n]) for every record, in order.

        A conversation that the template refuses goes to `book` as "chat_template"; a tokenizer without any chat
        template is a UserError under both policies.
        """
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            texts = iter(self._encode_texts([record.text for record in batch if record.text is not None]))
            for record in batch:
                encoded = next(texts) if record.text is not None else self._encode_chat(record, book)
                if encoded is not None:
                    yield encoded

    def _encode_texts(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if not texts:
            return []
        # verbose=False: that a document is longer than the model's window is expected, it is cut in packing.
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        documents = []
        for ids in encoded:
            if not ids or ids[-1] != self.eos_id:
                ids = [*ids, self.eos_id]
            documents.append((np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)))
        return documents

    def _encode_chat(self, record: Record, book: RecordLog):
        if self.template is None:
            raise UserError(
                f"{record.origin}: a conversation, but the tokenizer has no chat template; "
                "give one as data.chat_template"
            )
        try:
            return encode_chat(self.tokenizer, record.messages, self.template, origin=record.origin)
        except UserError as error:
            if book.on_bad == "fail":
                raise
            book.reject("chat_template", record.origin, str(error))
            return None

"""Conversations as tokens, with the loss on the assistant's answers only.

The text of a conversation is the chat template's. Which tokens are answers is told by the template itself where it
marks them with {% generation %} (and it is then the template that heeds `mask: 1` of an answer that is not to be
learned); else by rendering the conversation turn by turn: an answer is what is added between
"everything before it, with the prompt for an answer" and "everything up to it". That is right only if each rendering
is a prefix of the next and of the whole, which is checked for every conversation: templates that rewrite earlier
turns (dropping their reasoning, say) are refused with a message, never trained on by guess.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from moe_dist.errors import UserError

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


def resolve_template(tokenizer, override: str | None = None) -> str | None:
    """The chat template to use: `override` (Jinja text or a file of it), else the tokenizer's; None if there is none.

    A tokenizer with several named templates gives the one called "default".
    """
    if override is None:
        template = tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template
    if "{%" in override or "{{" in override:
        return override
    path = Path(override).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: '{override}' is neither Jinja text nor a readable file ({error})"
        ) from error


def template_hash(template: str | None) -> str | None:
    """Hex sha256 of a chat template: the same for training and evaluation, or they speak different formats."""
    return None if template is None else hashlib.sha256(template.encode("utf-8")).hexdigest()


def encode_chat(tokenizer, messages: list[dict], template: str, *, origin: str = "conversation"):
    """Tokens of a conversation and which of them are answers.

    Returns (ids int32 [n], loss bool [n]). origin: where the conversation lies, for messages.
    UserError if the template fails, or gives no way to tell the answers.
    """
    if not tokenizer.is_fast:
        raise UserError("chat data needs a fast tokenizer (one that knows the characters of a token)")
    if "mask" not in template and any(message.get("mask") for message in messages):
        raise UserError(
            f"{origin}: a message has `mask`, which the chat template does not look at; give one that does as "
            "data.chat_template, as in configs/esft/paper.yaml"
        )
    spans_of = _marked_spans if _GENERATION.search(template) else _prefix_spans
    text, spans = spans_of(tokenizer, messages, template, origin)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    ids, loss = np.asarray(encoded["input_ids"], dtype=np.int32), np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        loss |= (starts >= begin) & (starts < end)
    if not loss[1:].any():  # the first token is never predicted
        raise UserError(f"{origin}: the chat template gives the conversation no answer tokens to learn from")
    return ids, loss


def _render(tokenizer, messages, template, origin, *, prompt=False, marks=False):
    """(text, character spans of {% generation %} blocks where `marks` asks for them). prompt: with that for an answer.

    Not by the tokenizer's `apply_chat_template`: what it gives for blocks is tokens, and wrong ones for a block of the
    first token alone, or one that begins with a space where the tokenizer's offsets leave spaces out.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        (text,), spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except UserError:
        raise
    except Exception as error:  # Jinja errors, and what templates raise on roles they do not know
        raise UserError(f"{origin}: the chat template refuses the conversation: {error}") from error
    return text, spans[0] if marks else []


def _marked_spans(tokenizer, messages, template, origin):
    return _render(tokenizer, messages, template, origin, marks=True)


def _prefix_spans(tokenizer, messages, template, origin):
    whole, _ = _render(tokenizer, messages, template, origin)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if turn:
            before, _ = _render(tokenizer, messages[:turn], template, origin, prompt=True)
        upto, _ = _render(tokenizer, messages[: turn + 1], template, origin)
        if not (upto.startswith(before) and whole.startswith(upto)):
            raise UserError(
                f"{origin}: the chat template renders message {turn + 1} differently once others follow, so its "
                "answer cannot be located; give a template that marks answers with {% generation %} as "
                "data.chat_template"
            )
        spans.append((len(before), _answer_end(upto, len(before), tokenizer.eos_token)))
    return whole, spans


def _answer_end(text: str, begin: int, eos: str | None) -> int:
    """End of the answer in text[begin:]: white space that the template puts after the end mark is not learned."""
    if eos:
        bare = text.rstrip()
        if len(bare) > begin and bare.endswith(eos):
            return len(bare)
    return len(text)

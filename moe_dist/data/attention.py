"""How a model is called on packed rows so that its attention stays within documents.

transformers (since version 5) derives the mask of packed rows from position_ids: a position that does not follow its
left neighbour's starts a document, and each document attends to itself alone, under the family's causal or sliding
window. It does so only if
  - it gets no attention mask: with a 2-D mask a row is taken for one document, and attention crosses;
  - it makes no cache: `use_cache` is on by default, also in training, and switches the derivation off;
  - the family hands position_ids on to where masks are made. Those that do not (`OWN_MASKS`) get ready masks, made
    by the same functions of transformers, one for each kind of layer;
  - the attention implementation works on masks. Flash attention reads document borders from position_ids only for a
    batch of one row, and recurrent or convolutional layers carry state over borders: `check_packing` refuses both.
"""

from moe_dist.errors import UserError

PACKED_ATTENTION = ("eager", "sdpa", "flex_attention")
# Families of transformers whose forward makes masks without position_ids, but takes ready ones by kind of layer.
OWN_MASKS = ("afmoe", "gpt_oss", "granitemoehybrid")
# Kinds of layers whose only way to mix tokens is attention under that mask.
ATTENTION_LAYERS = ("attention", "full_attention", "sliding_attention", "chunked_attention")


def model_inputs(batch: dict, config, *, dtype=None) -> dict:
    """The keyword arguments with which a transformers model is called for a batch.

    batch: input_ids and position_ids, int64 [B, L], on the model's device. config: the model's config.
    dtype: of the model's activations, fp32 when None (eager attention adds its mask in it).
    """
    mask = None
    if config.model_type in OWN_MASKS:
        mask = ready_masks(batch["position_ids"], config, dtype=dtype)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": mask,
        "use_cache": False,
    }


def ready_masks(position_ids, config, *, dtype=None):
    """The masks that a model makes of position ids [B, L], by the same functions of transformers: one [B, 1, L, L], or
    one for each kind of layer in a dict, whichever the model takes.

    None stands for plain causal attention where the implementation needs no mask for it: every row is one document,
    not longer than a window.
    """
    import torch
    from transformers.masking_utils import create_masks_for_generate

    # Batch, length, dtype and device are all that the mask functions read from the embeddings.
    shape_only = torch.empty((*position_ids.shape, 0), dtype=dtype or torch.float32, device=position_ids.device)
    return create_masks_for_generate(
        config=config.get_text_config(),
        inputs_embeds=shape_only,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )


def check_packing(config) -> None:
    """Raise UserError where packed documents would see each other.

    config: the config of a built model (its attention implementation is then settled).
    """
    advice = "set data.packing=false"
    attention = config._attn_implementation
    if attention not in PACKED_ATTENTION:
        known = ", ".join(PACKED_ATTENTION)
        raise UserError(
            f"attention '{attention}' does not keep packed documents apart; choose one of {known}, or {advice}"
        )
    other = sorted(set(_layer_kinds(config)) - set(ATTENTION_LAYERS))
    if other:
        raise UserError(
            f"{config.model_type} has layers of kind {', '.join(other)}, which mix packed documents; {advice}"
        )


def _layer_kinds(config) -> list[str]:
    text = config.get_text_config()
    for name in ("layers_block_type", "layer_types"):
        if kinds := getattr(text, name, None):
            return list(kinds)
    return []

"""The configuration of a training run, as typed dataclasses: every key, its default, and one line about it.

This file is the reference: `moe-dist train --help-keys` prints it. Bounds and choices stand beside the
default; `moe_dist.config.checks` checks them, and what relates several keys to each other.
"""

from dataclasses import dataclass, field
from typing import Any


def key(default, doc: str, *, choices=None, low=None, above=None, high=None, free: bool = False):
    """A dataclass field with its documentation and bounds.

    default: the default value; lists, dicts and section classes become factories.
    choices: allowed values. low/high: inclusive bounds. above: exclusive lower bound.
    free: the key may change when a run is resumed (it does not change what is learned).
    """
    metadata = {"doc": doc, "choices": choices, "low": low, "above": above, "high": high, "free": free}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunSection:
    name: str | None = key(None, "Name of the run; the config file's stem when absent.", free=True)
    dir: str | None = key(None, "Run folder; runs/<name> when absent.", free=True)
    seed: int = key(0, "Seed of the data order and of everything random in training.", low=0)


@dataclass
class ModelSection:
    path: str | None = key(None, "Hugging Face folder or hub name to start from.")
    config: dict[str, Any] | None = key(
        None, "Inline architecture instead of path: model_type and the fields of its transformers config."
    )
    seed: int = key(0, "Seed of the random weights of an inline architecture.", low=0)
    dtype: str | None = key(
        None,
        "Dtype in which weights are loaded; as stored (inline: float32) when absent.",
        choices=(None, "float32", "bfloat16"),
    )
    attention: str | None = key(
        None,
        "Attention implementation of transformers (eager, sdpa, ...); its default when absent.",
        free=True,
    )
    tokenizer: str | None = key(
        None, "Folder or hub name of the tokenizer, or offline (a small one of our own); beside the model when absent."
    )
    base_states: str | None = key(
        None,
        "Folder that keeps what the router of a base_last_hidden mixture reads, so that the base model's pass is made "
        "in the first epoch only; tokens x hidden x 2 or 4 bytes.",
        free=True,
    )
    trust_remote_code: bool = key(False, "Run code from the model's repository; needs model.revision.")
    revision: str | None = key(None, "Commit of the hub repository; required with trust_remote_code.")


@dataclass
class Source:
    """One source of text. Exactly one of path, hub and corpus is set."""

    path: str | None = key(None, "Local file or folder: JSON, JSONL, Parquet or text.")
    hub: str | None = key(None, "Dataset name on the Hugging Face hub.")
    corpus: str | None = key(None, "Name of an offline corpus (text that any machine holds).")
    name: str | None = key(None, "Name in metrics; derived from the source when absent.")
    subset: str | None = key(None, "Configuration name of a hub dataset.")
    revision: str | None = key(None, "Commit of a hub dataset.")
    split: str = key("train", "Split of the dataset.")
    format: str = key(
        "auto", "text: one document in `field`; chat: messages in `field`.", choices=("auto", "text", "chat")
    )
    field: str | None = key(None, "Field that holds the document; text or messages when absent.")
    weight: float = key(1.0, "Share of this source in the mixture, relative to the others.", above=0)
    streaming: bool = key(False, "Read without downloading or indexing the whole; needs a hub or a Parquet source.")
    limit: int | None = key(None, "Use at most this many documents.", low=1)


@dataclass
class DataSection:
    train: list[Source] = key([], "Training sources: a list, or a mapping of name to source.")
    eval: list[Source] = key([], "Held-out domains: a list, or a mapping of name to source.", free=True)
    eval_fraction: float = key(0.0, "Share of every training source held out when data.eval is empty.", low=0, high=0.5)
    seq_len: int = key(512, "Tokens of a training sequence.", low=2)
    packing: bool | str = key(
        True,
        "Several documents in one sequence: true keeps attention and loss within each; esft joins them as the ESFT "
        "repository does.",
        choices=(True, False, "esft"),
    )
    cache_dir: str | None = key(None, "Where tokenised data is kept; ~/.cache/moe_dist when absent.", free=True)
    chat_template: str | None = key(
        None, "Jinja template, or a file of one, in place of the tokenizer's own chat template."
    )
    on_bad_record: str = key(
        "fail",
        "What a corrupt record does: stop with its place, or be counted and left out.",
        choices=("fail", "skip"),
    )


@dataclass
class ParallelSection:
    world_size: int | None = key(
        None, "Ranks that the launcher has to start; another number is refused before anything loads.", low=1, free=True
    )
    expert: int = key(1, "Ranks over which the experts of a layer are spread (EP).", low=1, free=True)
    node_size: int | None = key(
        None, "Consecutive ranks that share a node; what the launcher says when absent.", low=1, free=True
    )
    tensor: int = key(1, "Tensor-parallel ranks.", low=1, free=True)
    sequence: int = key(1, "Sequence-parallel ranks.", low=1, free=True)
    pipeline: int = key(1, "Pipeline stages.", low=1, free=True)
    zero_stage: int = key(1, "DeepSpeed ZeRO stage.", choices=(0, 1, 2, 3), free=True)
    placement: str = key(
        "contiguous",
        "Which expert lives where: in order, or with trainable experts spread evenly.",
        choices=("contiguous", "balanced"),
        free=True,
    )
    placement_scores: str | None = key(
        None, "summary.json of `esft score`: balanced then spreads the load that it has counted, too.", free=True
    )
    spare_experts: int = key(
        0,
        "Seats a rank and layer for copies of frozen experts, which even out the load and spare the wire; needs "
        "parallel.placement=balanced.",
        low=0,
        free=True,
    )
    reduce_bucket_size: int = key(
        50_000_000,
        "Elements of a ZeRO reduction bucket (its buffers count against memory).",
        low=1,
        free=True,
    )


@dataclass
class MoeSection:
    balance_loss: str = key(
        "none",
        "Load-balance loss: none, transformers' own, or per layer: micro-batch, sequence, global batch.",
        choices=("none", "hf", "layer_micro", "layer_sequence", "layer_global"),
    )
    balance_coef: float = key(0.01, "Factor of the load-balance loss.", low=0)
    z_loss_coef: float = key(0.0, "Factor of the router z-loss; 0 = off.", low=0)
    expert_bias_rate: float = key(0.0, "Step of the balancing expert bias (families that have one); 0 = off.", low=0)
    capacity_factor: float | None = key(
        None,
        "Most slots of an expert, over its even share of a rank's tokens; more are dropped. null = dropless.",
        above=0,
    )
    dispatcher: str = key(
        "auto",
        "How tokens travel: a row for each expert (alltoall), for each rank (dedup), or for each node and then each "
        "rank of it (node); auto takes the one that sends least.",
        choices=("auto", "alltoall", "dedup", "node"),
        free=True,
    )
    experts_backend: str = key(
        "auto",
        "What computes the experts: one after the other (loop), one grouped kernel (grouped), threads over experts in "
        "C++ (native), one product padded to the fullest (batched; where that costs little); measured takes the "
        "fastest of them, timed before the first step; auto knows a rule.",
        choices=("auto", "loop", "grouped", "native", "batched", "measured"),
        free=True,
    )
    wire: str = key(
        "model",
        "Sums of a token's experts travel home in the model's dtype, or unrounded in float32.",
        choices=("model", "float32"),
        free=True,
    )
    chunks: int = key(1, "Parts of a micro-batch that travel while another is computed.", low=1, free=True)
    overlap: bool | None = key(
        None,
        "Shared experts compute while tokens travel; not with ZeRO 3. When absent: on a GPU.",
        free=True,
    )


@dataclass
class TrainSection:
    steps: int = key(100, "Optimizer steps of the whole schedule.", low=1)
    stop_at: int | None = key(
        None, "Save and end after this step; the schedule still runs to train.steps.", low=1, free=True
    )
    micro_batch_size: int = key(1, "Sequences per rank in one forward pass.", low=1, free=True)
    global_batch_size: int | None = key(
        None, "Sequences of an optimizer step over all ranks; one micro-batch per rank when absent.", low=1
    )
    lr: float = key(1e-4, "Peak learning rate.", low=0)
    schedule: str = key("cosine", "Course of the learning rate after warm-up.", choices=("cosine", "constant", "wsd"))
    warmup_steps: int = key(0, "Steps of linear warm-up.", low=0)
    decay_steps: int | None = key(None, "wsd: steps of the final decay (a tenth of train.steps when absent).", low=1)
    min_lr_ratio: float = key(0.0, "Last learning rate over the peak.", low=0, high=1)
    betas: list[float] = key([0.9, 0.95], "AdamW betas.")
    eps: float = key(1e-8, "AdamW epsilon.", above=0)
    weight_decay: float = key(0.1, "AdamW weight decay (matrices only).", low=0)
    clip_norm: float | None = key(1.0, "Clip gradients at this global norm; null = never.", above=0)
    precision: str = key(
        "bf16", "Arithmetic of forward and backward; masters are fp32 in both.", choices=("fp32", "bf16")
    )
    recompute: bool = key(False, "Recompute activations in backward (neither routing nor communication).", free=True)
    nan_policy: str = key(
        "skip",
        "A step with a non-finite loss or gradient is skipped on all ranks, or stops the run.",
        choices=("skip", "stop"),
        free=True,
    )
    max_skips: int = key(10, "Consecutive skipped steps after which the run stops.", low=0, free=True)
    log_every: int = key(10, "Steps between metric lines.", low=1, free=True)
    eval_every: int = key(0, "Steps between evaluations on the held-out domains; 0 = at the end.", low=0, free=True)
    eval_batches: int | None = key(None, "Most batches per domain in an evaluation; all when absent.", low=1, free=True)


@dataclass
class TrainableSection:
    include: list[str] = key(["*"], "Glob patterns of parameter names that train.")
    exclude: list[str] = key([], "Glob patterns taken out again.")
    experts: dict[str, list[int]] | None = key(
        None, "Layer index to the expert ids that train; layers not named train none. null = all that match."
    )
    shared_experts: bool = key(True, "Shared experts that match train; false freezes them.")
    non_expert_modules: bool = key(True, "What is no expert of either kind and matches trains; false freezes it.")
    experts_file: str | None = key(
        None, "Expert config of `esft select`: gives experts, shared_experts and non_expert_modules."
    )
    freeze_router: bool = key(False, "Freeze router weight, bias and the update of the expert bias.")


@dataclass
class LoraSection:
    """LoRA on a dense model: its tensors train, and nothing else. Built by PEFT, exported as an adapter of PEFT."""

    rank: int = key(0, "Rank of A and B; 0 = no LoRA. Of a run with LoRA, `export` writes the adapter.", low=0)
    alpha: float = key(16.0, "What A and B add is scaled by alpha / rank.", above=0)
    dropout: float = key(0.0, "Share of the inputs of A that training drops.", low=0, high=0.9)
    targets: list[str] = key(
        ["all-linear"], "Linear layers, by name or its end (q_proj); all-linear: all but the output layer."
    )
    seed: int = key(0, "Seed of A; B starts at zero, so that training starts at the base model.", low=0)


@dataclass
class CheckpointSection:
    every: int = key(0, "Steps between checkpoints; 0 = none but the last.", low=0, free=True)
    keep: int = key(2, "Newest checkpoints that are kept.", low=1, free=True)
    save_last: bool = key(True, "Save after the last step.", free=True)
    background: bool = key(
        False,
        "Write while training goes on; takes this rank's weights, masters and moments once more in host memory.",
        free=True,
    )
    on_error: str = key(
        "stop",
        "A checkpoint that cannot be saved (disk full, say) stops the run, or is left out; the last one always stops.",
        choices=("stop", "continue"),
        free=True,
    )
    keep_best: bool = key(
        False,
        "Save and keep the model with the lowest held-out loss (mean over the domains); needs train.eval_every.",
        free=True,
    )


@dataclass
class LoggingSection:
    wandb: str = key("off", "Weights & Biases beside metrics.jsonl.", choices=("off", "online", "offline"), free=True)
    project: str = key("moe_dist", "Project of Weights & Biases.", free=True)
    tags: list[str] = key([], "Tags of Weights & Biases.", free=True)


@dataclass
class LaunchSection:
    preflight: bool = key(True, "Several ranks: check hosts, network and disk before the model loads.", free=True)
    join_timeout: float = key(300.0, "Seconds in which all ranks have to appear.", above=0, free=True)
    hang_timeout: float | None = key(
        None,
        "Seconds without progress, anywhere, after which all ranks are ended; 0 = never. When absent 600, or 20 times "
        "the slowest stretch of a step; 7200 for loading, tokenising and saving.",
        low=0,
        free=True,
    )
    check_replicas: int = key(
        500, "Steps between checks that weights which ranks share are the same to the bit; 0 = never.", low=0, free=True
    )


@dataclass
class RunConfig:
    run: RunSection = key(RunSection, "The run and its folder.")
    model: ModelSection = key(ModelSection, "The model to start from.")
    data: DataSection = key(DataSection, "Training and held-out text.")
    parallel: ParallelSection = key(ParallelSection, "How ranks share the work.")
    moe: MoeSection = key(MoeSection, "Routing losses and dispatch.")
    train: TrainSection = key(TrainSection, "Optimizer, schedule, precision.")
    trainable: TrainableSection = key(TrainableSection, "What trains and what is frozen.")
    lora: LoraSection = key(LoraSection, "LoRA: small matrices that train beside a frozen dense model.")
    checkpoint: CheckpointSection = key(CheckpointSection, "When checkpoints are written.")
    launch: LaunchSection = key(LaunchSection, "Meeting, watching and ending the ranks.")
    logging: LoggingSection = key(LoggingSection, "Where metrics go besides metrics.jsonl.")

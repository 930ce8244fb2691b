"""Models of the experiment on Nexus' quality, built and kept as runs of the framework do it, and their tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.logging import disable_progress_bar

from moe_dist.config.schema import ModelSection, RunConfig
from moe_dist.models import export_model
from moe_dist.parallel.grid import Grid
from moe_dist.train.build import build_model, plan_model


def build(**model) -> nn.Module:
    """A model as `moe-dist train` builds it, dense or a mixture. model: keys of its section `model`."""
    disable_progress_bar()
    config = RunConfig(model=ModelSection(**model))
    return build_model(config, plan_model(config, Grid.single()), Grid.single())


def keep(model: nn.Module, folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    export_model(model, folder, tokenizer=byte_tokenizer(), grid=Grid.single())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the byte i; documents end with a zero byte."""
    names = bytes_to_unicode()
    vocabulary = {character: byte for byte, character in names.items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=names[0])

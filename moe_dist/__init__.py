"""moe_dist: distributed training of Mixture-of-Experts language models.

Hugging Face checkpoint in, Hugging Face checkpoint out. Importing this package is cheap: torch, transformers and
deepspeed are imported by the modules that use them.
"""

__version__ = "0.1.0"

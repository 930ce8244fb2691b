"""Self-MoE: a base model writes its own data, learns one LoRA expert a skill, and becomes a mixture of them.

examples:
  moe-dist self-moe generate generate.yaml generated
"""

VERBS = {
    "generate": "let the base model write instructions and answers for each skill",
}

"""Self-MoE: a base model writes its own data, learns one LoRA expert a skill, and becomes a mixture of them."""

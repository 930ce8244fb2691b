"""ESFT: find the experts that a task uses, and train only those.

examples:
  moe-dist esft score config.yaml --out summary.json
  moe-dist esft select --scores summary.json --kind token --p 0.2 --out expert_config.json
  moe-dist train config.yaml trainable.experts_file=expert_config.json run.dir=runs/intent
  moe-dist esft adapter runs/intent adapters/intent
  moe-dist esft merge adapters/intent merged --base BASE_MODEL
"""

VERBS = {
    "score": "score every expert by how much a task uses it",
    "select": "choose the experts that train from their scores",
    "adapter": "write what a run has trained as an adapter",
    "merge": "put adapters into their base model: a plain Hugging Face folder",
}

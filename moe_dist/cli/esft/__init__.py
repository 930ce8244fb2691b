"""ESFT: find the experts that a task uses, and train only those.

examples:
  moe-dist esft score config.yaml --out summary.json
  moe-dist esft select --scores summary.json --kind token --p 0.2 --out expert_config.json
"""

VERBS = {
    "score": "score every expert by how much a task uses it",
    "select": "choose the experts that train from their scores",
}

"""ESFT: find the experts that a task uses, and train only those.

examples:
  moe-dist esft select --scores summary.json --kind token --p 0.2 --out expert_config.json
"""

VERBS = {
    "select": "choose the experts that train from their scores",
}

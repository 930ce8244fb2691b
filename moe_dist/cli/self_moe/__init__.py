"""Self-MoE: a base model writes its own data, learns one LoRA expert a skill, and becomes a mixture of them.

examples:
  moe-dist self-moe generate generate.yaml generated
  moe-dist self-moe specialise specialise.yaml run.dir=experts
  moe-dist self-moe compose compose.yaml composed
  moe-dist train router.yaml model.path=composed run.dir=runs/router
  moe-dist export runs/router mixture
  moe-dist self-moe evaluate evaluate.yaml results evaluate.model=mixture
  moe-dist self-moe export mixture math-model --expert math --form merged
  moe-dist run configs/self_moe/quickstart.yaml          all of it, on a small model, in minutes
"""

VERBS = {
    "generate": "let the base model write instructions and answers for each skill",
    "specialise": "train one LoRA expert for each skill, side by side where there are ranks for it",
    "compose": "make one model of a base and its experts: a mixture, or a merge to compare it with",
    "evaluate": "answer held-out items: exact match, programs that run, lm-evaluation-harness",
    "export": "write one expert of a mixture by itself: an adapter of PEFT, or merged into the base",
}

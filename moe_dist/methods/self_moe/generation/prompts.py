"""The texts that make a base model write instructions and answers: one YAML file a skill, ours or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.config.load import read_mapping
from moe_dist.data.fingerprint import digest
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.seeds import Seed

SHIPPED = Path(__file__).parent / "prompts"
GENERIC = "generic"
INSTRUCTION_SHOTS = 3  # seeds in context of a brainstorming prompt (Self-MoE, section 3.1)
RESPONSE_SHOTS = 5  # seed pairs in context of a response prompt


@dataclass(frozen=True)
class Prompts:
    """The prompts of a skill. prompts/generic.yaml says what each key is for; `origin` is where they were read."""

    brainstorm: str
    tasks: int
    answer: str
    pair: str
    origin: str

    @property
    def hash(self) -> str:
        """Hex sha256 of the texts, wherever they lie."""
        return digest({name: value for name, value in asdict(self).items() if name != "origin"})

    def instruction_prompt(self, seeds: Sequence[Seed]) -> str:
        """The text that ends with the number of the task that the model is to write."""
        items = [f"{number}. {seed.instruction}" for number, seed in enumerate(seeds, start=1)]
        return "\n".join([self.brainstorm.replace("{count}", str(self.tasks)), *items, f"{len(seeds) + 1}."])

    @property
    def instruction_stop(self) -> str:
        """The list is complete where one task more would begin."""
        return f"\n{self.tasks + 1}."

    def response_prompt(self, seeds: Sequence[Seed], instruction: str) -> str:
        """The text that ends where the model is to answer `instruction`."""
        pairs = [_fill(self.pair, seed.instruction, seed.response) for seed in seeds]
        return "\n\n".join([self.answer, *pairs, _fill(self.pair, instruction, "").rstrip(" ")])

    @property
    def response_stop(self) -> str:
        """An answer is complete where the next pair would begin."""
        return f"\n{self.pair.partition('{instruction}')[0].strip()}"


def _fill(pair: str, instruction: str, response: str) -> str:
    before, _, after = pair.partition("{instruction}")
    return before + instruction + after.removesuffix("{response}") + response


def shipped() -> list[str]:
    """Names of the prompt files that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_prompts(skill: str, given: str | None = None) -> Prompts:
    """The prompts of `skill`: a shipped name or a file of one's own; else those of its name, else generic.

    Raises UserError naming the file and the key for anything that is not such a file.
    """
    name = given or (skill if skill in shipped() else GENERIC)
    path = SHIPPED / f"{name}.yaml" if name in shipped() else Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"generate.prompts.{skill}={name}: no such file, and not one of {', '.join(shipped())}")
    tree = read_mapping(path)
    known = [name for name in Prompts.__dataclass_fields__ if name != "origin"]
    for key in [*tree, *known]:
        if key not in known or key not in tree:
            raise UserError(f"{path}: {'no key' if key in known else 'unknown key'} {key}; there is {', '.join(known)}")
    for key in ("brainstorm", "answer", "pair"):
        if not isinstance(tree[key], str) or not tree[key].strip():
            raise UserError(f"{path}: {key} has to be a text")
    if type(tree["tasks"]) is not int or tree["tasks"] <= INSTRUCTION_SHOTS:
        raise UserError(f"{path}: tasks={tree['tasks']} has to be a number above the {INSTRUCTION_SHOTS} seeds shown")
    pair = tree["pair"] = tree["pair"].rstrip()
    before, _, after = pair.partition("{instruction}")
    if not before.strip() or pair.count("{instruction}") != 1 or pair.count("{response}") != 1 or before == pair:
        raise UserError(f"{path}: pair has to hold {{instruction}} and {{response}} once each, after a heading")
    if not after.endswith("{response}"):
        raise UserError(f"{path}: pair has to end with {{response}}, from where the model goes on")
    return Prompts(**tree, origin=name if path.parent == SHIPPED else str(path))

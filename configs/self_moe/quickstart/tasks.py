"""Tasks of three skills that a program can solve, in the forms that the stages of the recipe read.

Usage: tasks.py FOLDER. It gets: base.jsonl, documents from which the base learns lists of tasks, and pairs of
instruction and response, with a tokenizer of them; seeds/SKILL.jsonl, 100 examples each; held-out/SKILL.jsonl, 60
others, of which nothing else has any; and copies of the prompts, the check, and the template of the Alpaca format.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from moe_dist.data.corpora import train_tokenizer

HERE = Path(__file__).parent
COPIED = (HERE / "prompts.yaml", HERE / "check.py", HERE.parent / "alpaca.jinja")
DOCUMENTS, SEEDS, HELD_OUT, TOKENS = 24000, 100, 60, 400
PAIRS = 6  # in one document, as in a prompt for an answer
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LETTERS = "abcdefgh"  # a token each, as digits are: few tokens are soon learned
Task = tuple[str, str]  # instruction, response


def sums(draw: random.Random) -> Task:
    first, *others = (draw.randint(1, 9) for _ in range(3))
    text = " ".join([str(first), *(f"{draw.choice('+-')} {number}" for number in others)])
    return f"What is {text}?", f"So {text} = {eval(text)}"


def letters(draw: random.Random) -> Task:
    chosen = draw.choices(LETTERS, k=4)
    kind, found = draw.choice([("Reverse", chosen[::-1]), ("Sort", sorted(chosen))])
    return f"{kind} the letters {' '.join(chosen)}.", f"They are {' '.join(found)}"


def counts(draw: random.Random) -> Task:
    letter, listed = draw.choice(LETTERS), draw.choices(LETTERS[:4], k=draw.randint(3, 6))
    return f"How often is {letter} in {' '.join(listed)}?", str(listed.count(letter))


SKILLS: dict[str, Callable[[random.Random], Task]] = {"sums": sums, "letters": letters, "counts": counts}


def distinct(skill: str, count: int, *, without: dict[str, str], draw: random.Random) -> dict[str, str]:
    """Instruction -> response of tasks that are not in `without`."""
    found: dict[str, str] = {}
    while len(found) < count:
        instruction, response = SKILLS[skill](draw)
        if instruction not in without:
            found[instruction] = response
    return found


def document(prompts: dict, skill: str, *, without: dict[str, str], draw: random.Random) -> str:
    """A list of tasks of one skill or some pairs, as the prompts begin them; or one pair in the Alpaca format."""
    kind = draw.random()
    if kind < 0.25:
        tasks = distinct(skill, prompts["tasks"], without=without, draw=draw)
        numbered = [f"{number}. {instruction}" for number, instruction in enumerate(tasks, 1)]
        return "\n".join([prompts["brainstorm"].replace("{count}", str(len(tasks))), *numbered])
    if kind < 0.6:
        ((instruction, response),) = distinct(skill, 1, without=without, draw=draw).items()
        return f"{ALPACA}\n\n### Instruction:\n{instruction}\n\n### Response:\n{response}"
    pairs = distinct(skill, PAIRS, without=without, draw=draw).items()
    texts = [prompts["pair"].replace("{instruction}", i).replace("{response}", r) for i, r in pairs]
    return "\n\n".join([prompts["answer"], *texts])


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in COPIED:
        shutil.copy(file, folder)
    prompts = yaml.safe_load((HERE / "prompts.yaml").read_text())
    draw, kept = random.Random(0), {}
    for skill in SKILLS:
        held_out = distinct(skill, HELD_OUT, without={}, draw=draw)
        seeds = distinct(skill, SEEDS, without=held_out, draw=draw)
        for name, tasks in (("held-out", held_out), ("seeds", seeds)):
            write(folder / name / f"{skill}.jsonl", [{"instruction": i, "output": r} for i, r in tasks.items()])
        kept |= held_out
    texts = [document(prompts, draw.choice([*SKILLS]), without=kept, draw=draw) for _ in range(DOCUMENTS)]
    write(folder / "base.jsonl", [{"text": text} for text in texts])
    train_tokenizer(texts[:4000], vocab_size=TOKENS).save_pretrained(folder / "tokenizer")
    print(f"{len(texts):,} documents, and for each of {', '.join(SKILLS)} {SEEDS} seeds and {HELD_OUT} held-out tasks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

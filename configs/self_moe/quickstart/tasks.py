"""Tasks of three skills that a program can solve, in the forms that the stages of the recipe read.

Usage: tasks.py FOLDER. It gets: base.jsonl, documents from which the base learns lists of tasks, and pairs of
instruction and response; seeds/SKILL.jsonl, 100 examples each; held-out/SKILL.jsonl, 60 others, of which nothing else
has any; and copies of the prompts, the check, and the template of the Alpaca format.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

HERE = Path(__file__).parent
COPIED = (HERE / "prompts.yaml", HERE / "check.py", HERE.parent / "alpaca.jinja")
DOCUMENTS, SEEDS, HELD_OUT = 8000, 100, 60
PAIRS = 6  # in one document, as in a prompt for an answer
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
Task = tuple[str, str]  # instruction, response


def word(draw: random.Random, syllables: int = 2) -> str:
    return "".join(draw.choice("bdklmnrst") + draw.choice("aeio") for _ in range(syllables))


def sums(draw: random.Random) -> Task:
    left, right = draw.randint(10, 89), draw.randint(1, 9)
    sign, result = draw.choice([("+", left + right), ("-", left - right)])
    return f"What is {left} {sign} {right}?", f"{left} {sign} {right} = {result}"


def words(draw: random.Random) -> Task:
    text = word(draw)
    return draw.choice([(f"Double the word {text}.", f"{text} {text}"), (f"Invert the word {text}.", text[::-1])])


def counts(draw: random.Random) -> Task:
    text, letter = word(draw, draw.randint(1, 3)), draw.choice("aeio")
    return f"Count the letter {letter} in {text}.", str(text.count(letter))


SKILLS: dict[str, Callable[[random.Random], Task]] = {"sums": sums, "words": words, "counts": counts}


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
    print(f"{len(texts):,} documents, and for each of {', '.join(SKILLS)} {SEEDS} seeds and {HELD_OUT} held-out tasks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

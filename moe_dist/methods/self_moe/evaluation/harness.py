"""lm-evaluation-harness on a model that is in memory, a mixture as well as any other.

Its tasks bring their own prompts and data sets, which come from the Hugging Face hub, and some run what the model has
written as a program, without locking it down: nothing of that happens without `harness.run_code`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.evaluation.config import HarnessSection
from moe_dist.methods.self_moe.generation.local_model import LocalModel

RUNS_CODE = ("humaneval", "mbpp")  # known without loading a task; the harness itself tells the others
_NETWORK = ("ConnectionError", "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError")


def check_harness(section: HarnessSection, *, ranks: int) -> None:
    """What can be known before any model is loaded. Raises UserError with what to do."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("harness.tasks needs lm-evaluation-harness: pip install 'moe_dist[eval]'")
    if ranks > 1:
        raise UserError("harness.tasks runs as one plain process; evaluate.sets runs on several")
    code = [task for task in section.tasks if task.startswith(RUNS_CODE)]
    if code and not section.run_code:
        raise _without_consent(", ".join(code))


def run_harness(section: HarnessSection, model: LocalModel) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} as the harness reports it, with the number of examples in context and of items.

    Raises UserError for unknown tasks, for data that cannot be had, and for tasks that run code without consent.
    """
    if section.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the question of the metric `code_eval`
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    include = None if section.include is None else str(Path(section.include).expanduser())
    manager = TaskManager(include_path=include)
    unknown = [task for task in section.tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"harness.tasks: lm-evaluation-harness knows no {', '.join(unknown)}; `lm_eval ls tasks` lists")
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=section.batch_size),
            tasks=list(section.tasks),
            num_fewshot=section.shots,
            limit=section.limit,
            apply_chat_template=section.chat,
            task_manager=manager,
            confirm_run_unsafe_code=section.run_code,
            log_samples=False,
        )
    except Exception as error:
        if "marked as unsafe" in str(error):
            raise _without_consent(", ".join(section.tasks)) from None
        if _is_network(error):
            raise UserError(
                f"harness.tasks: the data of {', '.join(section.tasks)} cannot be had ({type(error).__name__}: {error})"
                ". It comes from the Hugging Face hub: run once where there is network, with HF_HOME on a disk that "
                "this machine shares, or give tasks with data of your own in harness.include"
            ) from None
        raise
    return {
        task: {
            **{name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "alias"},
            "shots": found["n-shot"].get(task),
            "items": (found.get("n-samples") or {}).get(task, {}).get("effective"),
        }
        for task, values in found["results"].items()
    }


def _without_consent(tasks: str) -> UserError:
    return UserError(
        f"harness.tasks: {tasks} runs programs that the model has written, on this machine and without locking them "
        "down. Where that is all right (a container, a machine without secrets), say so with harness.run_code=true; "
        "evaluate.sets with metric pass_at_1 runs them locked down"
    )


def _is_network(error: BaseException | None) -> bool:
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & set(_NETWORK) or "offline mode" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False

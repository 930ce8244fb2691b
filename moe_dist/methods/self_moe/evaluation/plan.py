"""What `evaluate --dry-run` prints: everything that can be known without the model."""

from __future__ import annotations

from moe_dist.methods.self_moe.evaluation.config import PASS_AT_1, EvaluateConfig
from moe_dist.methods.self_moe.evaluation.evaluate import contamination
from moe_dist.methods.self_moe.evaluation.items import read_items
from moe_dist.methods.self_moe.judging.checker import protection
from moe_dist.methods.self_moe.judging.contamination import refuse_above
from moe_dist.methods.self_moe.judging.scoring import check_items


def describe(config: EvaluateConfig) -> list[str]:
    """The evaluation in lines; items are read and checked, and their overlap with `seen` measured."""
    section, harness = config.evaluate, config.harness
    model = section.model + (f" with the adapter {section.adapter}" if section.adapter else "")
    lines = [f"{model}: {section.prompt} prompts, greedy, batches of {section.batch_size}"]
    sets = {}
    for held_out in section.sets:
        items = sets[held_out.name] = read_items(held_out.path)[: held_out.limit]
        check_items(held_out, items)
        lines.append(
            f"{held_out.name}: {held_out.path}, {len(items):,} items, {held_out.metric}, at most "
            f"{held_out.max_tokens:,} tokens"
        )
    if any(held_out.metric == PASS_AT_1 for held_out in section.sets):
        lines.append(f"programs run under: {', '.join(protection())}")
    reports = contamination(section, sets)
    refuse_above(reports, section.max_contamination)
    lines += [report.render() for report in reports]
    if harness.tasks:
        shots = "as each task says" if harness.shots is None else harness.shots
        lines.append(f"lm-evaluation-harness: {', '.join(harness.tasks)}; examples in context: {shots}")
        lines.append(
            f"  that its tasks run what the model has written is {'allowed' if harness.run_code else 'refused'}"
        )
    return lines

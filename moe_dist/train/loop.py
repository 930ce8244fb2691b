"""Training from a configuration, top to bottom: start, build, resume, step, save, evaluate."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from moe_dist import checkpoint
from moe_dist.config.checks import accumulation, check_layout
from moe_dist.config.schema import RunConfig
from moe_dist.data.attention import check_packing
from moe_dist.data.loader import build_data
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, PolicyStop, UserError
from moe_dist.train import run_folder, state
from moe_dist.train.agree import agree, any_asked, global_mean
from moe_dist.train.backends import check_backend, choose_backends
from moe_dist.train.best import Best
from moe_dist.train.build import build_model, load_tokenizer, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.evaluate import held_out
from moe_dist.train.metrics import MetricLog
from moe_dist.train.passes import run_forwards, run_passes
from moe_dist.train.proof import ChangeProof
from moe_dist.train.ranks import Together, ranks_together
from moe_dist.train.replicas import check_replicas
from moe_dist.train.routing import Routing, check_routing
from moe_dist.train.saving import Saver
from moe_dist.train.schedule import learning_rate
from moe_dist.train.skipped import suspects
from moe_dist.train.start import on_rank_zero
from moe_dist.train.table import record, render

ROUTING_WINDOWS = 20  # lines that say what every expert got in a stretch of steps: so many a run, however long it is


def train(config: RunConfig, *, resume: str = "auto", overwrite: bool = False, may_differ: Sequence[str] = ()) -> int:
    """Run the training that `config` describes, or go on with it. Collective: every rank calls it.

    may_differ: keys ("train.lr") in which a run that goes on may differ from what it was started with.
    Returns the exit code: 0, or 85 where a signal stopped the run after a save. Raises UserError for what is wrong
    with the input, PolicyStop where `train.nan_policy` ends the run.
    """
    with ranks_together(config) as ranks:
        code = _train(config, ranks, resume=resume, overwrite=overwrite, may_differ=may_differ)
        ranks.guard.beat("the end")
    if code == EXIT_PREEMPTED and ranks.grid.rank == 0:
        (Path(config.run.dir) / run_folder.STOP_FILE).unlink(missing_ok=True)  # the next start is not meant
    return code


def _train(config: RunConfig, ranks: Together, *, resume: str, overwrite: bool, may_differ: Sequence[str]) -> int:
    settings, parallel = config.train, config.parallel
    grid, stop, guard, device = ranks.grid, ranks.stop, ranks.guard, ranks.grid.device
    check_layout(config, grid.world)

    # Whatever can be wrong with the input is found before anything is written, the cheap things first.
    root = on_rank_zero(lambda: run_folder.check(config, resume=resume, overwrite=overwrite, may_differ=may_differ))
    plan = plan_model(config, grid)
    check_backend(config, plan.skeleton)
    check_routing(config.moe, plan.skeleton)
    ranks.check_room(config, plan)
    guard.beat("building data")
    data = build_data(config.data, load_tokenizer(config, plan), seed=config.run.seed)
    if data.train is None:
        raise UserError("data.train is empty: give at least one training source")
    if any_asked(stop, grid):
        return EXIT_PREEMPTED  # nothing has been loaded, and nothing is lost
    guard.beat("loading the model")
    model = build_model(config, plan, grid)
    if config.data.packing is True:
        check_packing(model.config)
    micro_batches = accumulation(config, grid.world)
    engine = build_engine(
        model,
        grid,
        zero_stage=parallel.zero_stage,
        precision=settings.precision,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        accumulation_steps=micro_batches,
        reduce_bucket_size=parallel.reduce_bucket_size,
    )
    routing = Routing(model, config.moe, grid)

    guard.beat("resuming")
    best, best_before = Best(config, data.eval, state.group_of(grid)), None
    step, tokens = 0, 0
    folder = Path(config.run.dir)
    found = None if root is None else state.find(root, state.group_of(grid))
    if found is None and resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: holds no complete checkpoint")
    if found is not None:
        with checkpoint.open_checkpoint(found) as opened:
            state.restore(opened, engine, plan)
            step, tokens = opened.step, int(opened.trainer_state["tokens"])
            data.train.load_state_dict(opened.trainer_state["sampler"])
            best_before = opened.trainer_state.get("best")
    last = min(settings.steps, settings.stop_at or settings.steps)

    on_rank_zero(lambda: run_folder.write(config, overwrite=overwrite, world=grid.world))
    if grid.rank == 0:
        run_folder.cut_metrics(folder / run_folder.METRICS, step, ended=step >= last)
    backends = choose_backends(config, model, grid)
    best.restore(best_before, folder / run_folder.CHECKPOINTS)
    log = MetricLog(config, active=grid.rank == 0, start_step=step, file=folder / run_folder.METRICS)
    table = {"zero_stage": parallel.zero_stage, "precision": settings.precision}
    log.say(render(plan.all_stages, plan.selection, grid, **table))
    for line in [*routing.announce(), *filter(None, [backends])]:
        log.say(line)
    log.say(f"resuming {config.run.name} from {found}" if found else f"starting {config.run.name} in {folder}")
    log.write("data", step, **data.summary)
    log.write("trainable", step, layers=record(plan.all_stages, plan.selection, grid, **table))
    for name, source in data.summary["train"].items():
        if not source.get("streaming"):
            log.say(
                f"data {name}: {source['documents']:,} documents, {source['tokens']:,} tokens, {source['rows']:,} rows"
            )

    def losses(batches: Iterable[dict]) -> Iterator[torch.Tensor]:
        return run_forwards(engine.forward, model, routing, batches, grid, guard=guard)

    def evaluate() -> dict[str, dict[str, float]]:
        guard.beat("evaluation")
        results = {}
        for domain, rows in data.eval.items():
            batches = rows.batches(
                rank=grid.data_rank, ranks=grid.data, micro_batch=settings.micro_batch_size, limit=settings.eval_batches
            )
            results[domain] = held_out(losses, model, (to_device(batch, device) for batch in batches), grid)
            log.say(f"step {step}  held-out {domain}  loss {results[domain]['loss']:.4f}")
        if results:
            named = getattr(model.config, "expert_names", None)
            log.write("eval", step, domains=results, **({"expert_names": list(named)} if named else {}))
        return results

    saver = Saver(config, engine, plan, grid, best=best, log=log, guard=guard)
    proof = ChangeProof(engine, grid) if step < last else None
    skips_in_a_row, saved_at, evaluated_at, code = 0, step, None, EXIT_OK
    routing_window = -(-settings.steps // ROUTING_WINDOWS)
    clock, timed_tokens = time.perf_counter(), 0
    while step < last:
        guard.beat("reading a batch", step)
        started = time.perf_counter()
        before = data.train.state_dict()
        batches = data.train.next_batch(
            micro_batches * settings.micro_batch_size * grid.data,
            rank=grid.data_rank,
            ranks=grid.data,
            micro_batch=settings.micro_batch_size,
        )
        batches = [to_device(batch, device) for batch in batches]
        work = time.perf_counter() - started
        labels, real_tokens, asked_to_stop, votes = agree(batches, stop.requested, saver.vote(), grid)
        saver.look(votes)
        if asked_to_stop:
            data.train.load_state_dict(before)  # these rows have not been trained on
            code = EXIT_PREEMPTED
            break
        # Dropout, if any, is a function of seed, step and rank: a resumed run needs no stored random state.
        torch.manual_seed((config.run.seed * 1_000_003 + step) * 65_537 + grid.rank)
        routing.start_step()
        passes = run_passes(engine, routing, batches, labels=labels, grid=grid, guard=guard)
        guard.worked(work + passes.work, team=grid.pipeline_rank)
        guard.beat("the update")
        lr = learning_rate(
            settings.schedule,
            step,
            peak=settings.lr,
            total=settings.steps,
            warmup=settings.warmup_steps,
            decay=settings.decay_steps,
            min_ratio=settings.min_lr_ratio,
        )
        result = engine.step(lr)
        routing.end_step(skipped=result.skipped)
        step, tokens, timed_tokens = step + 1, tokens + real_tokens, timed_tokens + real_tokens
        log.advance()

        skips_in_a_row = skips_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            log.say(f"step {step} skipped on all ranks: a loss or a gradient is not finite")
            rows = data.train.drawn(
                before, len(batches) * settings.micro_batch_size * grid.data, micro_batch=settings.micro_batch_size
            )
            log.write("skipped", step, grad_norm=result.grad_norm, batches=suspects(passes.finite, rows, grid))
            if settings.nan_policy == "stop" or skips_in_a_row > settings.max_skips:
                saver.settle()
                raise PolicyStop(
                    f"{skips_in_a_row} step(s) in a row up to step {step} had a loss or gradient that is not "
                    "finite. Saved checkpoints are untouched. Look at the data of these steps, lower train.lr, "
                    "or raise train.max_skips"
                )
        if proof is not None and engine.steps - engine.skipped_steps == 2:
            unreached = proof.check(engine, lr=lr, eps=settings.eps)
            log.say("proved: nothing frozen has changed, and everything that got a gradient has")
            if unreached:
                log.say(f"{len(unreached)} tensors of rank 0 got no gradient yet: {', '.join(unreached[:6])}")
            proof = None
        if config.launch.check_replicas and step % config.launch.check_replicas == 0:
            check_replicas(model, config, grid, step=step)
        if step % settings.log_every == 0 or step == last:
            guard.beat("the log", step)
            for slow in guard.notices():
                log.say(f"step {step}  {slow.pop('text')}")
                log.write("straggler", step, **slow)
            rate = timed_tokens / (time.perf_counter() - clock)
            mean = global_mean(passes.loss_sum, labels, grid)
            log.write(
                "train",
                step,
                loss=mean,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens=tokens,
                tokens_per_second=round(rate, 1),
                skipped=engine.skipped_steps,
                **routing.figures(),
            )
            log.say(
                f"step {step}/{settings.steps}  loss {mean:.4f}  lr {lr:.2e}  "
                f"norm {result.grad_norm:.3f}  {rate:,.0f} tokens/s"
            )
            clock, timed_tokens = time.perf_counter(), 0
        if step % routing_window == 0:
            log.write("experts", step, **routing.window())
        due = bool(config.checkpoint.every) and step % config.checkpoint.every == 0
        # At the end the model is saved before it is evaluated, unless that decides which one is kept.
        if best.counts(step) or (settings.eval_every and step % settings.eval_every == 0 and step < last):
            if best.counts(step):
                saver.settle()  # what is judged is compared with what has been saved
            results, evaluated_at = evaluate(), step
            if best.counts(step) and best.judge(step, results):
                log.say(f"step {step}  the lowest held-out loss so far: {best.loss:.4f}")
                due = True
        guard.beat("saving", step)
        if due and saver.save(step, sampler=data.train.state_dict(), tokens=tokens, last=step == last):
            saved_at = step
    guard.beat("saving", step)
    if routing.window_steps:
        log.write("experts", step, **routing.window())
    saver.settle(last=step == saved_at)
    if step != saved_at and (code == EXIT_PREEMPTED or config.checkpoint.save_last):
        saver.save(step, sampler=data.train.state_dict(), tokens=tokens, last=True)
    if code == EXIT_OK and any_asked(stop, grid):
        code = EXIT_PREEMPTED  # all steps are done and saved; the next start evaluates
    if code == EXIT_PREEMPTED:
        log.say(f"stopped on request at step {step}; the same command goes on from here")
    elif evaluated_at != step:
        evaluate()
    log.close()
    engine.close()
    return code


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: tensor.to(device) for name, tensor in batch.items()}

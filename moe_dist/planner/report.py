"""From a configuration and a cluster to a plan."""

from __future__ import annotations

from moe_dist.config.checks import check_layout, smallest_world
from moe_dist.config.schema import RunConfig
from moe_dist.planner.hardware import Cluster
from moe_dist.planner.render import render
from moe_dist.planner.search import evaluate, layout_of, rank
from moe_dist.planner.study import Study


def plan(config: RunConfig, cluster: Cluster, *, wanted: int = 10) -> str:
    """The text of `moe-dist plan`. wanted: layouts to rank, 0 for none.

    The config's own layout is left out where the cluster has another number of GPUs than it fits. Raises UserError for
    a configuration that cannot run.
    """
    fits = config.parallel.world_size in (None, cluster.gpus) and cluster.gpus >= smallest_world(config)
    if fits or not wanted:
        check_layout(config, cluster.gpus)
    study = Study(config)
    own = None
    if fits or not wanted:
        own = evaluate(study, layout_of(config, cluster.gpus, node_size=cluster.node_size), cluster)
    if own is not None:
        sequences = own.layout.data * own.layout.micro_batch * own.layout.micro_batches
    else:
        sequences = config.train.global_batch_size or config.train.micro_batch_size * cluster.gpus
    ranking = rank(study, cluster, sequences=sequences, wanted=wanted) if wanted else None
    return render(study, cluster, own, ranking, sequences=sequences)

"""Token and gate scores, counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_dist.cli.main import main
from moe_dist.config.expert_files import read_summary
from moe_dist.errors import EXIT_OK, EXIT_USER, UserError
from moe_dist.methods.esft.counting import ExpertCounter, sum_over_ranks
from moe_dist.methods.esft.score import score_logs, summarise
from tests.methods.esft import published

EXPERTS, TOP_K = 8, 3


def routing(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and weights `[rows, length, K]`; the rows differ in length, the rest of each is padding."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, length, EXPERTS, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP_K)
    for row in range(rows):
        ids[row, length - row :] = -1
    return ids, weights


def count(*batches) -> ExpertCounter:
    counter = ExpertCounter(EXPERTS)
    for batch in batches:
        counter.add(*batch)
    return counter


def test_a_toy_of_two_sequences_by_hand():
    """Two experts of three a token. Sequence one has two tokens, sequence two one."""
    ids = torch.tensor([[[0, 1], [0, 2]], [[1, 0], [-1, -1]]])
    weights = torch.tensor([[[0.5, 0.25], [0.75, 0.125]], [[0.5, 0.5], [9.0, 9.0]]])
    counter = ExpertCounter(3)
    counter.add(ids, weights)
    assert (int(counter.tokens), int(counter.sequences)) == (3, 2)
    assert counter.counts_E.tolist() == [3, 2, 1]
    assert counter.token_scores().tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=1e-15)
    assert counter.gate_scores().tolist() == pytest.approx([1.75 / 3, 0.75 / 3, 0.125 / 3], abs=1e-15)
    by_sequence = [(2 / 4 + 1 / 2) / 2, (1 / 4 + 1 / 2) / 2, (1 / 4 + 0) / 2]
    assert counter.token_scores("per_sequence").tolist() == pytest.approx(by_sequence, abs=1e-15)
    gate_by_sequence = [(1.25 / 2 + 0.5) / 2, (0.25 / 2 + 0.5) / 2, (0.125 / 2 + 0) / 2]
    assert counter.gate_scores("per_sequence").tolist() == pytest.approx(gate_by_sequence, abs=1e-15)


@pytest.mark.parametrize("norm", ["per_token", "per_sequence"])
def test_sums(norm):
    ids, weights = routing(5, 9)
    counter = count((ids, weights))
    real = ids[..., 0] >= 0
    assert counter.token_scores(norm).sum().item() == pytest.approx(1, abs=1e-12)
    mass_BL = weights.double().sum(-1) * real
    expected = mass_BL.sum() / real.sum() if norm == "per_token" else (mass_BL.sum(1) / real.sum(1)).mean()
    assert counter.gate_scores(norm).sum().item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("norm", ["per_token", "per_sequence"])
def test_neither_batches_nor_order_change_the_scores(norm):
    ids, weights = routing(6, 9)
    whole = count((ids, weights))
    split = count(*((ids[r : r + 1], weights[r : r + 1]) for r in (3, 0, 5, 1, 4, 2)))
    assert split.counts_E.tolist() == whole.counts_E.tolist()
    assert torch.equal(split.token_scores("per_token"), whole.token_scores("per_token"))
    for scores in ("token_scores", "gate_scores"):
        difference = getattr(split, scores)(norm) - getattr(whole, scores)(norm)
        assert difference.abs().max() < 1e-15


def test_equal_lengths_make_the_norms_agree():
    ids, weights = routing(1, 9)
    counter = count((ids, weights), (ids.flip(1), weights))
    assert (counter.token_scores() - counter.token_scores("per_sequence")).abs().max() < 1e-15
    assert (counter.gate_scores() - counter.gate_scores("per_sequence")).abs().max() < 1e-15


def test_a_mask_takes_tokens_out():
    ids, weights = routing(3, 6)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = ExpertCounter(EXPERTS)
    masked.add(ids, weights, mask)
    expected = count((ids.masked_fill(~mask[..., None], -1), weights))
    assert torch.equal(masked.counts_E, expected.counts_E)
    assert torch.equal(masked.gate_share_E, expected.gate_share_E)


def test_without_tokens_there_is_no_score():
    with pytest.raises(UserError, match="no token"):
        count((torch.full((2, 3, TOP_K), -1), torch.ones(2, 3, TOP_K))).token_scores()
    with pytest.raises(UserError, match="score_norm"):
        count(routing(1, 3)).gate_scores("by_token")


def _share(rank_rows):
    """On each rank: counters of two layers over this rank's rows (none on the last rank), summed over ranks."""
    import torch.distributed as dist

    rows = rank_rows[dist.get_rank()]
    counters = [ExpertCounter(EXPERTS), ExpertCounter(EXPERTS)]
    for seed, counter in enumerate(counters):
        ids, weights = routing(6, 9, seed)
        if rows:
            counter.add(ids[rows], weights[rows])
    sum_over_ranks(counters, dist.group.WORLD)
    return summarise(dict(zip("12", counters, strict=True)), score_norm="per_sequence")


def test_ranks_add_up_their_counts(ranks):
    whole = summarise({str(seed + 1): count(routing(6, 9, seed)) for seed in (0, 1)}, score_norm="per_sequence")
    for split in ([[0, 1, 2, 3], [4, 5]], [[0, 1, 2, 3, 4, 5], []]):
        for summary in ranks(2, _share, split):
            for key in ("tokens", "sequences", "top_k", "token_counts"):
                assert summary.extra[key] == whole.extra[key]
            for kind, layers in whole.scores.items():
                for layer, scores in layers.items():
                    assert summary.scores[kind][layer] == pytest.approx(scores, abs=1e-15)


@published.needed
def test_the_published_routing_gives_the_published_scores():
    ids, weights, lengths = published.routing()
    official = read_summary(published.FOLDER / "intent_scores.json").scores
    for layer in range(26):
        counter, start = ExpertCounter(64), 0
        for length in lengths:
            part = slice(start, start + length)
            counter.add(torch.from_numpy(ids[layer, part])[None], torch.from_numpy(weights[layer, part])[None])
            start += length
        for kind, scores in (("token", counter.token_scores()), ("gate", counter.gate_scores())):
            exact = np.array(official[kind][str(layer + 1)])
            assert np.abs(scores.numpy() - exact).max() <= 5e-5
            assert [round(score, 4) for score in scores.tolist()] == official[kind][str(layer + 1)]
        by_sequence = counter.token_scores("per_sequence").numpy()
        assert np.abs(by_sequence - np.array(official["token"][str(layer + 1)])).max() > 5e-5


@published.needed
def test_published_logs_by_the_command_line(tmp_path, capsys):
    folder = tmp_path / "rank_0"
    folder.mkdir()
    (folder / "expert_weights_1.txt").symlink_to(published.FOLDER / "intent_expert_weights_1.txt")
    words = ["esft", "score", "--logs", str(tmp_path), "--top-k", "6", "--experts", "64"]
    assert main([*words, "--out", str(tmp_path / "s.json")]) == EXIT_OK
    summary, official = (read_summary(p) for p in (tmp_path / "s.json", published.FOLDER / "intent_scores.json"))
    for kind in ("token", "gate"):
        assert summary.scores[kind]["1"] == official.scores[kind]["1"]
    assert summary.extra["tokens"] == 8222
    assert summary.extra["sequences"] == 127
    assert "8,222 tokens in 127 sequences" in capsys.readouterr().out


def test_logs_of_several_ranks_and_damaged_ones(tmp_path):
    lines = {"rank_0/expert_weights_1.txt": "0\t1\t\t0.5\t0.5\n", "rank_1/expert_weights_1.txt": "1\t2\t\t0.25\t0.75\n"}
    for name, text in lines.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    summary = score_logs(tmp_path, top_k=2, num_experts=4)
    assert summary.scores["token"] == {"1": [0.25, 0.5, 0.25, 0.0]}
    assert summary.scores["gate"] == {"1": [0.25, 0.375, 0.375, 0.0]}
    with pytest.raises(UserError, match="expert 2 does not exist"):
        score_logs(tmp_path, top_k=2, num_experts=2)
    (tmp_path / "rank_0" / "expert_weights_3.txt").write_text(lines["rank_0/expert_weights_1.txt"])
    with pytest.raises(UserError, match="layer 3 has the routing of 1 tokens, layer 1 of 2"):
        score_logs(tmp_path, top_k=2, num_experts=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a CONFIG.yaml"),
        (["--logs", "."], "needs --top-k and --experts"),
        (["c.yaml", "--logs", "."], "takes no CONFIG.yaml"),
        (["c.yaml", "--top-k", "2"], "are for --logs"),
        (["c.yaml"], "c.yaml: no such file"),
    ],
)
def test_wrong_words(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["esft", "score", "--out", "s.json", *words]) == EXIT_USER
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()

"The log, the trackers, the report and the findings of a run."
import csv
import json
import sys

import pytest
import torch

from ddpo_scratch import report as R
from ddpo_scratch.config import TrainConfig, preset, read_config
from ddpo_scratch.evaluate import read_metrics


def row(epoch, **more): return dict(epoch=epoch, reward_queries=64*epoch, reward_mean=-2 + .1*epoch, reward_std=.3, reward_min=-3., reward_max=-1., **more)


def table(folder):
    with open(folder/"metrics.csv", newline="") as f: return list(csv.DictReader(f))


def test_log_writes_the_same_rows_as_json_and_csv_and_a_late_key_adds_a_column(tmp_path):
    log = R.RunLog(tmp_path/"run", TrainConfig(seed=3))
    rows = [row(1), row(2, eval_reward_mean=float("nan")), row(3, eval_reward_mean=.25)]
    for r in rows: log.row(r)
    assert list(table(tmp_path/"run")[0]) == [*rows[0], "eval_reward_mean"]
    assert [{k: float(v) for k, v in r.items() if v} for r in table(tmp_path/"run")][::2] == rows[::2]
    assert str(read_metrics(tmp_path/"run")) == str(rows) and table(tmp_path/"run")[1]["eval_reward_mean"] == "nan"
    assert read_config(tmp_path/"run") == TrainConfig(seed=3)
    log.close(); log.close()


def test_a_resumed_log_forgets_rows_after_its_checkpoint_and_a_half_written_line(tmp_path):
    log = R.RunLog(tmp_path, TrainConfig())
    for e in (1, 2, 3): log.row(row(e))
    with open(tmp_path/"metrics.jsonl", "a") as f: f.write('{"epoch": 4, "rew')
    again = R.RunLog(tmp_path, TrainConfig(), epoch=2)
    assert [r["epoch"] for r in read_metrics(tmp_path)] == [1, 2] and len(table(tmp_path)) == 2
    again.row(row(3, kl=.5))
    assert [r["epoch"] for r in table(tmp_path)] == ["1", "2", "3"] and table(tmp_path)[2]["kl"] == "0.5"
    assert len((tmp_path/"command.txt").read_text().splitlines()) == 2


def test_a_broken_line_in_the_middle_is_no_accident_and_is_not_hidden(tmp_path):
    (tmp_path/"metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(json.JSONDecodeError): R.RunLog(tmp_path, TrainConfig(), epoch=3)

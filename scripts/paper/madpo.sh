#!/usr/bin/env bash
# MADPO's experiment with the paper's settings (arXiv 2510.05342), on the embedded sentiment task: the four methods in three
# data qualities, the sensitivity to c_max and tau, and amplification and damping each by itself.
. "$(dirname "$0")/../common.sh"
runs=runs/paper/madpo
results=results/paper/madpo

score_sentiment $runs package://prefopt/data/sentiment_offline.jsonl.gz precision=bfloat16
for name in methods methods_beta_dpo sensitivity ablation; do
    sweep train +sweep=madpo/$name
done
[[ -n $dry ]] && exit
prefopt papers paper=madpo runs_dir=$runs/methods output=$results
for name in sensitivity ablation; do
    prefopt papers paper=madpo runs_dir=$runs/$name output=$results/$name
done

#!/usr/bin/env bash
# MaPPO in miniature. Offline: each base with and without it, three learning rates at one seed, the best one at two
# other seeds, and what comes of these evaluated: three small tasks, win rate by the oracle. Online: DPO with and without it
# in two stages, at the learning rate that was best offline.
. "$(dirname "$0")/../common.sh"
bases=dpo,simpo,ipo,cpo
methods=$bases,mappo_${bases//,/,mappo_}
runs=runs/mini/mappo
results=results/mini/mappo
tuning=(+sweep=mini/mappo "runs_dir=$runs/tuning" seed=100 optimizer.lr=2e-5,5e-5,1e-4)

sweep train "${tuning[@]}" "objective=$bases"
sweep train "${tuning[@]}" objective=mappo "objective/base=$bases"
train_best $methods $runs/tuning +sweep=mini/mappo
[[ -n $dry ]] && exit
evaluate_small "$(runs_in $runs/final)" final
prefopt report runs_dir=$runs/tuning output=$results/tuning
prefopt report runs_dir=$runs/final output=$results
prefopt papers paper=mappo runs_dir=$runs/final output=$results

# A sixth of the training prompts, so that a stage is one pass over its 32 pairs in four steps; best and worst of four
# responses, where the paper has eight: what takes long here is to draw them.
prompts=$runs/prompts.jsonl
zcat prefopt/data/sentiment_offline.jsonl.gz | awk '/"split": "train"/ && n++ < 64' > $prompts
stages=(dataset=sentiment_offline scorer=vader "prompts=$prompts" stages=2 samples_per_prompt=4 steps=4 batch_size=8
    eval_every=4 heldout_pairs=32 sampling.max_new_tokens=64 stage_sampling.max_new_tokens=64
    "runs_dir=$runs/online")
sweep online objective=dpo "optimizer.lr=$(best $runs/tuning dpo optimizer.lr)" "${stages[@]}" seed=0,1
sweep online objective=mappo "optimizer.lr=$(best $runs/tuning mappo_dpo optimizer.lr)" "${stages[@]}" seed=0,1
prefopt report runs_dir=$runs/online output=$results/online

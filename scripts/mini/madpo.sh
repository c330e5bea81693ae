#!/usr/bin/env bash
# MADPO's experiment in miniature: a reward model for each data quality, its scores, then each method with three learning
# rates at one seed of the high quality, and with the best one at two other seeds of all qualities. Of MADPO itself also the
# sensitivity to c_max and tau, and amplification and damping each by itself.
. "$(dirname "$0")/../common.sh"
methods=madpo,dpo,ipo
beta_dpo=(objective.margin_of=reward) # as in the paper's experiment
runs=runs/mini/madpo
results=results/mini/madpo

# The reward models learn from all prompts. A third of them is scored, for the policies see 64 pairs in a run.
rows=$runs/rows.jsonl
[[ -n $dry ]] || {
    mkdir -p $runs
    zcat prefopt/data/sentiment_offline.jsonl.gz | awk '/"split": "heldout"/ || n++ < 128' > $rows
}
score_sentiment $runs $rows
one=(+sweep=mini/madpo dataset.format.quality=high)
tuning=("runs_dir=$runs/tuning" seed=100 optimizer.lr=5e-5,1e-4,2e-4)
sweep train "${one[@]}" "${tuning[@]}" "objective=$methods"
sweep train "${one[@]}" "${tuning[@]}" objective=beta_dpo "${beta_dpo[@]}"
train_best $methods $runs/tuning +sweep=mini/madpo
train_best beta_dpo $runs/tuning +sweep=mini/madpo "${beta_dpo[@]}"
one+=(objective=madpo "optimizer.lr=$(best $runs/tuning madpo optimizer.lr)" "runs_dir=$runs/variants" seed=0)
sweep train "${one[@]}" objective.c_max=1.5,2,4 objective.tau=2,6.906754778648554
sweep train "${one[@]}" objective.only=amplification,damping
[[ -n $dry ]] && exit
for name in rewards tuning variants; do
    prefopt report runs_dir=$runs/$name output=$results/$name
done
prefopt report runs_dir=$runs/final output=$results columns=dataset.format.quality
prefopt papers paper=madpo runs_dir=$runs/final output=$results
prefopt papers paper=madpo runs_dir=$runs/variants output=$results/variants

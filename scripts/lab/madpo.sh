#!/usr/bin/env bash
# MADPO's comparison: a reward model for each data quality and seed, and each method with its own learning rate in each.
. "$(dirname "$0")/_begin.sh"

sweep train +sweep=lab/rewards "seed=$all_seeds"
for seed in ${all_seeds//,/ }; do
    of_seed=$lab/seeds/$seed
    unless_dry score_noisy $of_seed/noisy.jsonl.gz $of_seed/noisy_scored.jsonl.gz $lab/madpo/rewards reward-lab-lab "$seed" \
        precision=float32
done
for quality in high medium low; do
    madpo=(+sweep=lab/madpo "dataset.format.quality=$quality")
    of_quality=$lab/madpo/tuning/$quality
    train madpo,dpo,ipo "${madpo[@]}" "runs_dir=$of_quality" "${tuning[@]}"
    train beta_dpo "${madpo[@]}" "runs_dir=$of_quality" "${tuning[@]}" objective.margin_of=reward
    train_best madpo,dpo,ipo "$of_quality" "${madpo[@]}" "seed=$seeds"
    train_best beta_dpo "$of_quality" "${madpo[@]}" "seed=$seeds" objective.margin_of=reward
done
variants=(+sweep=lab/madpo dataset.format.quality=high runs_dir=$lab/madpo/variants seed=0,1)
train_best madpo $lab/madpo/tuning/high "${variants[@]}" objective.c_max=1.5,2,4 objective.tau=2,6.906754778648554
train_best madpo $lab/madpo/tuning/high "${variants[@]}" objective.only=amplification,damping
train_best beta_dpo $lab/madpo/tuning/high "${variants[@]}" objective.margin_of=log_ratio
# The same reward model with an error of a known size, in log-odds. Its own margins end at 4.3.
train_best madpo $lab/madpo/tuning/high +sweep=lab/madpo dataset.format.quality=high runs_dir=$lab/madpo/errors "seed=$seeds" \
    dataset.format.reward_error=0,1,4
[[ -n $dry ]] && exit

reports madpo/{rewards,methods,variants,errors} madpo/tuning/{high,medium,low}
prefopt papers paper=madpo runs_dir=$lab/madpo/methods output=$results/madpo/methods
prefopt papers paper=madpo runs_dir=$lab/madpo/variants output=$results/madpo/variants
prefopt claims

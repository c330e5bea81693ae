#!/usr/bin/env bash
# MADPO's comparison: a reward model for each data quality and seed, and each method at its own learning rate, tuned
# on the medium quality.
. "$(dirname "$0")/_begin.sh"

sweep train +sweep=lab/rewards "seed=$all_seeds"
for seed in ${all_seeds//,/ }; do
    of_seed=$lab/seeds/$seed
    unless_dry beside score_noisy $of_seed/noisy.jsonl.gz $of_seed/noisy_scored.jsonl.gz $lab/madpo/rewards reward-lab-lab "$seed" \
        precision=float32
done
joined
tune=(+sweep=lab/madpo dataset.format.quality=medium runs_dir=$lab/madpo/tuning "${tuning[@]}")
train madpo,dpo,ipo "${tune[@]}"
train beta_dpo "${tune[@]}" objective.margin_of=reward
final=(+sweep=lab/madpo dataset.format.quality=high,medium,low "seed=$seeds" "$(tuned $lab/madpo/tuning)")
train madpo,dpo,ipo "${final[@]}"
train beta_dpo "${final[@]}" objective.margin_of=reward
# MADPO at 3e-4 too, whatever it was tuned to: there DPO, beta-DPO and IPO were best.
train madpo +sweep=lab/madpo dataset.format.quality=high,medium,low runs_dir=$lab/madpo/equal "seed=$seeds" optimizer.lr=3e-4
high=(+sweep=lab/madpo dataset.format.quality=high "$(tuned $lab/madpo/tuning)")
variants=("${high[@]}" runs_dir=$lab/madpo/variants seed=0,1)
train madpo "${variants[@]}" objective.c_max=1.5,2,4 objective.tau=2,6.906754778648554
train madpo "${variants[@]}" objective.only=amplification,damping
train beta_dpo "${variants[@]}" objective.margin_of=log_ratio
# The same reward model with an error of a known size, in log-odds.
train madpo "${high[@]}" runs_dir=$lab/madpo/errors "seed=$seeds" dataset.format.reward_error=0,1,4
[[ -n $dry ]] && exit

reports madpo/{rewards,tuning,methods,equal,variants,errors}
prefopt papers paper=madpo runs_dir=$lab/madpo/methods output=$results/madpo/methods
prefopt papers paper=madpo runs_dir=$lab/madpo/variants output=$results/madpo/variants
prefopt claims

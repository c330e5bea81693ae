#!/usr/bin/env bash
# MADPO's experiment as published (arXiv 2510.05342): gemma-3-270m is fine-tuned on film reviews, draws two continuations of
# each prompt, an oracle labels pairs in three data qualities, a reward model learns each, and four methods train on them;
# then the sensitivity to c_max and tau, and amplification and damping each by itself.
. "$(dirname "$0")/../common.sh"
runs=runs/paper/madpo
results=results/paper/madpo
export PYTHONPATH=scripts/paper${PYTHONPATH:+:$PYTHONPATH} # the task's oracle is a function there
template=model.chat_template=scripts/paper/continuation.jinja

online=(env -u HF_HUB_OFFLINE "$python" -m prefopt.prefetch) # needs network; what is here already is left
unless_dry "${online[@]}" model=hub model.path=google/gemma-3-270m \
    "also=[stanfordnlp/imdb,cardiffnlp/twitter-roberta-base-sentiment-latest]"
[[ -n $dry || -f $runs/negatives.jsonl.gz ]] || $python scripts/paper/madpo_task.py $runs
sweep train +sweep=madpo/sft
policy=$(runs_in $runs/sft)/policy
[[ -z $dry ]] || policy=$runs/sft/policy # what it will be called does not matter
if [[ -z $dry && ! -f $runs/noisy.jsonl.gz ]]; then
    job sample model=hub "model.path=$policy" $template prompts=$runs/negatives.jsonl.gz keep_responses=true \
        samples_per_prompt=2 sampling.max_new_tokens=176 output=$runs/samples.jsonl.gz
    job score input=$runs/samples.jsonl.gz output=$runs/noisy.jsonl.gz scorer=function \
        scorer.function=madpo_task.positive
fi
sweep train +sweep=madpo/rewards
unless_dry score_noisy $runs/noisy.jsonl.gz $runs/scored.jsonl.gz $runs/rewards reward-gemma-3-270m-noisy 0
for name in methods methods_beta_dpo sensitivity ablation; do
    block train +sweep=madpo/$name "model.path=$policy"
done
joined
[[ -n $dry ]] && exit
prefopt papers paper=madpo runs_dir=$runs/methods output=$results
for name in sensitivity ablation; do
    prefopt papers paper=madpo runs_dir=$runs/$name output=$results/$name
done

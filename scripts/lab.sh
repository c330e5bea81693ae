#!/usr/bin/env bash
# The laboratory (docs/laboratory.md): the world, the policy that every experiment begins with, its scored responses, and
# then the experiments. SEEDS is their number of training seeds.
. "$(dirname "$0")/common.sh"
seeds=$(seq -s, 0 $((${SEEDS:-5} - 1)))
lab=runs/lab
results=results/lab
export OMP_NUM_THREADS=1 # the model is too small for two threads; two jobs use two cores

if [[ -n $dry && ! -f $lab/scored.jsonl.gz ]]; then
    echo "a dry run of the experiments needs what they begin with, and $lab has none yet: run it once without --dry-run"
    exit
fi
prefopt lab output=$lab/world
sweep train +sweep=lab/sft
ln -sfn "sft/$(basename "$(runs_in $lab/sft)")/policy" $lab/policy
if [[ ! -f $lab/scored.jsonl.gz ]]; then
    prefopt sample model=lab prompts=$lab/world/prompts.jsonl.gz output=$lab/samples.jsonl.gz samples_per_prompt=8 \
        sampling.max_new_tokens=40 sampling.batch_size=1024 precision=float32
    prefopt score input=$lab/samples.jsonl.gz output=$lab/scored.jsonl.gz scorer=lab
fi

methods=dpo,ipo,simpo,cpo,beta_dpo,mmpo,mappo,madpo,orpo,kto,sft
sweep train +sweep=lab/tuning "objective=$methods"
train_best $methods $lab/tuning +sweep=lab/objectives "seed=$seeds"
train_best dpo,simpo,mmpo $lab/tuning +sweep=lab/mmpo "seed=$seeds"
[[ -n $dry ]] && exit

for experiment in tuning objectives mmpo/methods; do
    prefopt harness "run=$lab/$experiment/*" include=$lab/world/tasks tasks=[lab_choice,lab_likelihood] \
        chat_template=true batch_size=128 precision=float32
    prefopt report runs_dir=$lab/$experiment output=$results/$experiment
done

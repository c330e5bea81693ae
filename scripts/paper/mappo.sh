#!/usr/bin/env bash
# MaPPO as the paper has it (arXiv 2507.21183): on each of seven models DPO and iterative DPO with and without it, on
# Qwen2.5-7B also SimPO, IPO and CPO; 8 responses to each prompt of UltraFeedback, scored by FsfairX-LLaMA3-RM-v0.1. Runs
# where there is a GPU, for sampling and scoring; one GPU holds what trains in it up to 3B parameters, above that add
# engine=zero2 and GPUs. MODELS (with spaces) is what to do.
. "$(dirname "$0")/../common.sh"
runs=runs/paper/mappo
prompts=HuggingFaceH4/ultrafeedback_binarized # with held-out ones
online_prompts=RLHFlow/UltraFeedback-preference-standard # the paper's; its rows repeat the prompts, which are taken once
reward_model=sfairXC/FsfairX-LLaMA3-RM-v0.1
plugin=Qwen/Qwen2.5-7B-Instruct # where MaPPO is a plug-in for the other methods too
models=(Qwen/Qwen2.5-{1.5B,3B,7B,14B,32B}-Instruct mistralai/Mistral-7B-Instruct-v0.3 meta-llama/Meta-Llama-3-8B-Instruct)
[[ -z ${MODELS:-} ]] || read -ra models <<< "$MODELS"

online=(env -u HF_HUB_OFFLINE "$python" -m prefopt.prefetch) # needs network; what is here already is left
unless_dry "${online[@]}" model=hub "model.path=$reward_model" dataset=ultrafeedback_binarized "also=[$online_prompts]" \
    tasks=mappo alpaca=true
for model in "${models[@]}"; do
    unless_dry "${online[@]}" model=hub "model.path=$model" dataset=ultrafeedback_binarized
done
commas() { (IFS=,; echo "$*"); }
unless_dry sweep sample model=hub "model.path=$(commas "${models[@]}")" "prompts=$prompts" split=train_prefs,test_prefs \
    samples_per_prompt=8 sampling.max_new_tokens=2048 backend=server "output=$runs/data/\${model.name}_\${split}.jsonl.gz"
samples=("${models[@]/#*\//$runs/data/}")
unless_dry sweep score "input=$(commas "${samples[@]/%/_train_prefs.jsonl.gz}" "${samples[@]/%/_test_prefs.jsonl.gz}")" \
    "output=\${input}.scored.jsonl.gz" scorer=hub_reward_model "scorer.path=$reward_model"
data=("dataset.train=$runs/data/\${model.name}_train_prefs.jsonl.gz.scored.jsonl.gz"
    "dataset.heldout=$runs/data/\${model.name}_test_prefs.jsonl.gz.scored.jsonl.gz")
for method in dpo mappo_dpo simpo mappo_simpo ipo mappo_ipo cpo mappo_cpo; do
    of_method=("${models[@]}")
    [[ $method == *dpo ]] || of_method=("$plugin")
    block train "+sweep=mappo/offline_$method" "model.path=$(commas "${of_method[@]}")" "${data[@]}"
done
for method in dpo mappo; do # in one process each
    unless_dry block online "+sweep=mappo/online_$method" "model.path=$(commas "${models[@]}")" "prompts=$online_prompts"
done
joined
[[ -n $dry ]] && exit

block harness "run=$(runs_in $runs)" checkpoints=initial,final tasks=mappo
# The paper's judge is GPT-4 Turbo (Preview-1106): JUDGE=gpt4_turbo, where the vendor still has it.
block alpaca "run=$(runs_in $runs)" baseline=gpt4_turbo "judge=${JUDGE:-gpt4o_mini}"
joined
prefopt papers paper=mappo runs_dir=$runs output=results/paper/mappo

#!/usr/bin/env bash
# MMPO's grid as the paper has it (arXiv 2510.22881): SFT, three objectives at their betas on four models, the ablations, the
# fork's margin; every epoch evaluated by ten tasks and two judges (OPENAI_API_KEY, ANTHROPIC_API_KEY). The learning rates
# are those of the paper's table 3; sweeps/sweep/mmpo/tuning_*.yaml are the stage that finds them.
. "$(dirname "$0")/../common.sh"
runs=runs/paper/mmpo

online=(env -u HF_HUB_OFFLINE "$python" -m prefopt.prefetch) # needs network; what is here already is left
unless_dry "${online[@]}" model=hub model.path=princeton-nlp/Llama-3-Base-8B-SFT dataset=mmpo_mix tasks=mmpo alpaca=true
for model in HuggingFaceTB/SmolLM2-{135M,360M} meta-llama/Llama-3.2-1B; do
    data=smol_smoltalk
    [[ $model == meta-llama/* ]] && data=ultrachat
    [[ $model == HuggingFaceTB/* ]] && instruct=HuggingFaceTB/SmolLM2-135M-Instruct || instruct=$model-Instruct
    unless_dry "${online[@]}" model=hub "model.path=$model" "model.tokenizer=$instruct" "dataset=$data"
done
unless_dry "${online[@]}" model=hub model.path=meta-llama/Llama-3.2-1B dataset=sftdatasetv3

# The policy of the SFT run whose name begins with $1; before it has been trained, in a dry run, what it will be called.
sft() { local run; run=$(runs_in $runs/sft "sft-$1"); echo "${run:-$runs/sft/$1}/policy"; }

block train +sweep=mmpo/sft_smollm2
sweep train +sweep=mmpo/sft_llama3_2_1b
sweep train +sweep=mmpo/sft_llama3_2_1b_v3 "model.path=$(sft Llama-3.2-1B-)"
joined
declare -A policy=([smollm2_135m]=$(sft SmolLM2-135M-) [smollm2_360m]=$(sft SmolLM2-360M-) [llama3_2_1b]=$(sft llama3.2-1b-))
for objective in dpo simpo mmpo; do
    for model in "${!policy[@]}"; do
        block train "+sweep=mmpo/${model}_$objective" "model.path=${policy[$model]}"
    done
    block train "+sweep=mmpo/llama3_8b_$objective"
done
for switch in length entropy auxiliary normalization; do
    block train "+sweep=mmpo/ablation_$switch" "model.path=${policy[smollm2_360m]}"
done
block train +sweep=mmpo/margin "model.path=${policy[smollm2_135m]}"
joined
[[ -n $dry ]] && exit

for group in $runs/*/; do
    group=$(basename "$group")
    block harness "run=$(runs_in "$runs/$group")" checkpoints=all tasks=mmpo
    [[ $group == sft ]] || block alpaca "run=$(runs_in "$runs/$group")" checkpoints=all judge=gpt4o_mini,claude_haiku
done
joined
prefopt papers paper=mmpo "runs_dir=$runs/[ls]*" output=results/paper/mmpo # the four models and SFT
prefopt papers paper=mmpo "runs_dir=$runs/[as]*" output=results/paper/mmpo/ablations

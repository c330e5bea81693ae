# What the laboratory's scripts share (docs/laboratory.md): the world, and for each seed the policy that its experiments begin
# with and the policy's scored responses. SEEDS is their number. Each method has the learning rate at which its grammatical
# samples have the most reward, at a seed that no experiment uses.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
seeds=$(seq -s, 0 $((${SEEDS:-5} - 1)))
tuning_seeds=100,101
all_seeds=$seeds,$tuning_seeds
lab=runs/lab
results=results/lab
best_by=sample_grammatical_reward
sampling=(sampling.max_new_tokens=40 sampling.batch_size=1024 precision=float32)
tuning=(seed=$tuning_seeds optimizer.lr=1e-4,3e-4,1e-3,3e-3)
[[ " $* " == *launcher.at_once=* ]] || on_slurm || arguments+=("launcher.at_once=$(nproc)")
export OMP_NUM_THREADS=1 # the model is too small for two threads. After nproc, which this would make 1

if [[ -n $dry && ! -f $lab/seeds/${tuning_seeds%,*}/noisy_scored.jsonl.gz ]]; then
    echo "a dry run of the experiments needs what they begin with, and $lab has none yet: run it once without --dry-run"
    exit
fi

# Rows with samples of each seed's policy and their exact reward: $2 samples for each row of $1, into $3.
scored() {
    sweep sample model=lab "seed=$all_seeds" "prompts=$lab/world/$1.jsonl.gz" "output=$lab/seeds/\${seed}/$3_samples.jsonl.gz" \
        samples_per_prompt="$2" "${sampling[@]}" "${@:4}"
    local seed rows
    for seed in ${all_seeds//,/ }; do
        rows=$lab/seeds/$seed/$3
        [[ -f $rows.jsonl.gz ]] || beside prefopt score "input=${rows}_samples.jsonl.gz" "output=$rows.jsonl.gz" scorer=lab
    done
    joined
}

# Whether all that the experiments begin with is there; and to make it.
begun() {
    local seed
    for seed in ${all_seeds//,/ }; do [[ -f $lab/seeds/$seed/noisy.jsonl.gz ]] || return 1; done
}
begin() {
    local seed run
    unless_dry prefopt lab output=$lab/world
    sweep train +sweep=lab/sft "seed=$all_seeds"
    [[ -z $dry ]] || return 0
    for seed in ${all_seeds//,/ }; do
        run=$(run_of_seed $lab/sft sft-lab "$seed")
        mkdir -p "$lab/seeds/$seed"
        ln -sfn "../../sft/${run##*/}/policy" "$lab/seeds/$seed/policy"
    done
    scored prompts 8 scored
    scored negatives 2 noisy keep_responses=true
}
begun || begin

# LM accuracy of the runs in the folder $1; the rest are further arguments.
capability() {
    prefopt harness "run=$lab/$1/*" include=$lab/world/tasks tasks=lab_choice chat_template=true batch_size=128 \
        precision=float32 "${@:2}" > /dev/null
}

# Tables, figures and records of each of the folders.
reports() {
    local folder
    for folder in "$@"; do prefopt report "runs_dir=$lab/$folder" "output=$results/$folder"; done
}

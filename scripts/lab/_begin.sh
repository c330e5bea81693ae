# What the laboratory's scripts share (docs/laboratory.md): the world, the policy that every experiment begins with, and its
# scored responses. SEEDS is the number of training seeds. Each method has the learning rate at which its grammatical samples
# have the most reward, on a seed that no experiment uses.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
seeds=$(seq -s, 0 $((${SEEDS:-5} - 1)))
lab=runs/lab
results=results/lab
best_by=sample_grammatical_reward
sampling=(sampling.max_new_tokens=40 sampling.batch_size=1024 precision=float32)
tuning=(seed=100 optimizer.lr=1e-4,3e-4,1e-3,3e-3)
export OMP_NUM_THREADS=1 # the model is too small for two threads; two jobs use two cores
[[ " $* " == *launcher.at_once=* || " $* " == *launcher=slurm* ]] || arguments+=(launcher.at_once=2)

if [[ -n $dry && ! -f $lab/madpo/scored.jsonl.gz ]]; then
    echo "a dry run of the experiments needs what they begin with, and $lab has none yet: run it once without --dry-run"
    exit
fi

# Rows with samples of the policy and their exact reward: $2 samples for each row of $1, into $3.
scored() {
    [[ ! -f $lab/$3.jsonl.gz ]] || return 0
    local drawn=$lab/${3}_samples.jsonl.gz
    prefopt sample model=lab "prompts=$lab/world/$1.jsonl.gz" "output=$drawn" samples_per_prompt="$2" "${sampling[@]}" "${@:4}"
    prefopt score "input=$drawn" "output=$lab/$3.jsonl.gz" scorer=lab
}

prefopt lab output=$lab/world
sweep train +sweep=lab/sft
ln -sfn "sft/$(basename "$(runs_in $lab/sft)")/policy" $lab/policy
scored prompts 8 scored
scored negatives 2 madpo/noisy keep_responses=true

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

. "$(dirname "$0")/_begin.sh"
train dpo,mmpo +sweep=lab/objectives seed=0 runs_dir=runs/lab/again optimizer.lr=3e-4
train mmpo +sweep=lab/objectives seed=0 runs_dir=runs/lab/again optimizer.lr=1e-3
capability again tasks=[lab_choice,lab_likelihood]
prefopt harness "run=$(ls -d $lab/again/dpo*)" checkpoints=initial include=$lab/world/tasks tasks=lab_choice chat_template=true batch_size=128 precision=float32

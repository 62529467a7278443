#!/usr/bin/env bash
# Starts a training recipe on one node, on several (torchrun) or under SLURM (srun), logs to OUTPUT/output.log, hands
# signals on to the ranks and ends with training's own exit code.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

usage() {
    [[ ! -f ${script:-} ]] || sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    cat <<END
usage: ${script:-launch.sh RECIPE|CONFIG.yaml} [PRETRAINED=DIR ...] [DATA=DIR] [OUTPUT=DIR] [TOKENIZER=FILE]
       [KEY=VALUE | --KEY VALUE ...]

  PRETRAINED  folder of the model; once more for a delta or trained parts that lie on top of it
  DATA        folder of the files that configs/data names, also from the environment (default: data)
  OUTPUT      folder for checkpoints, logs and the final model (default: output/${name:-NAME}); a run in it goes on
  TOKENIZER   tokenizer file, where PRETRAINED has none
  KEY=VALUE   any setting that \`accessory train --help\` explains; dry_run=true only shows what the run would be

One rank per visible GPU of this node, or NPROC_PER_NODE. In a SLURM allocation: srun, with the allocation's tasks.
With NNODES above 1, once on each node: torchrun, which needs NODE_RANK, MASTER_ADDR and MASTER_PORT. PYTHON chooses
the interpreter, LAUNCHER (node, torchrun, srun, rank) overrules the choice.
Exit code 75: a signal (TERM, USR1) stopped the run after a checkpoint; the same command goes on from it.
END
}

fail() {
    echo "${0##*/}: error: $1" >&2
    exit 2
}

# ---- what to run
recipe=${1:---help} name='' script=''
shift || true
case $recipe in
    -h | --help) usage && exit 0 ;;
    *.yaml | *.yml) config=$recipe ;;
    *) config=$root/configs/train/$recipe.yaml script=$root/exps/$recipe.sh ;;
esac
[[ -f $config ]] || fail "$config: no such recipe, expected a YAML file or the name of one below configs/train"
name=$(basename "${config%.*}") pretrained=() settings=() dry=''
output=output/$name
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        PRETRAINED=*) pretrained+=("${1#*=}") ;;
        DATA=*) DATA=${1#*=} ;;
        TOKENIZER=*) settings+=("--tokenizer_path=${1#*=}") ;;
        OUTPUT=* | output_dir=* | --output_dir=*) output=${1#*=} ;;
        --output_dir) (($# > 1)) || fail "--output_dir: no value, expected a folder" && output=$2 && shift ;;
        dry_run=true | --dry_run=true | --dry_run) dry=1 && settings+=("$1") ;;
        *) settings+=("$1") ;;
    esac
    shift
done
train=(-m accessory train "$config" --output_dir="$output")
((${#pretrained[@]} == 0)) || train+=(--model_name_or_path "${pretrained[@]}")
((${#settings[@]} == 0)) || train+=("${settings[@]}")
export DATA=${DATA:-data} PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
[[ -z $dry ]] || exec "$python" "${train[@]}"

# ---- with which launcher
mode=${LAUNCHER:-}
if [[ -z $mode ]]; then
    if ((${NNODES:-1} > 1)); then
        mode=torchrun
    elif [[ -n ${RANK:-} ]] || ((${SLURM_STEP_NUM_TASKS:-1} > 1)); then
        mode=rank # somebody's torchrun or srun started this script once per rank
    elif [[ -n ${SLURM_JOB_ID:-} ]] && ((${SLURM_STEP_ID:-4294967295} > 4294967000)); then
        mode=srun # an allocation, seen from its batch script or its interactive shell, and no step of it
    else
        mode=node
    fi
fi
case $mode in
    rank) exec "$python" "${train[@]}" ;;
    node) command=("$python" "${train[@]}" ${NPROC_PER_NODE:+--nproc_per_node="$NPROC_PER_NODE"}) ;;
    srun)
        command=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
        command+=("$python" "${train[@]}")
        ;;
    torchrun)
        place=(--standalone)
        if ((${NNODES:-1} > 1)); then
            for need in NODE_RANK MASTER_ADDR MASTER_PORT; do
                [[ -n ${!need:-} ]] || fail "$need: not set, expected it beside NNODES=$NNODES, on each node"
            done
            place=(--nnodes="$NNODES" --node-rank="$NODE_RANK")
            place+=(--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
        fi
        place+=(--nproc-per-node="${NPROC_PER_NODE:-gpu}")
        command=("$python" -m torch.distributed.run "${place[@]}" "${train[@]}")
        ;;
    *) fail "LAUNCHER: got $mode, expected node, torchrun, srun or rank" ;;
esac

# ---- run it, with a log, signals and an exit code
child='' caught=''
pass() { # srun kills its tasks at a TERM and torchrun 30 seconds later; USR1 says the same to the ranks themselves
    local signal=$1 to=("$child")
    caught=1
    [[ -n $child ]] || exit 143
    [[ $mode == node || $signal != TERM ]] || signal=USR1
    if [[ $mode == torchrun && $signal == USR1 ]]; then
        to=()
        read -ra to <"/proc/$child/task/$child/children" || true # no newline ends it
        ((${#to[@]})) || { to=("$child") && signal=TERM; }
    fi
    kill -s "$signal" "${to[@]}" 2>/dev/null || true
}
trap 'pass INT' INT
trap 'pass USR1' USR1
trap 'pass TERM' TERM HUP

mkdir -p "$output"
log=$output/output.log
((${NODE_RANK:-0} == 0)) || log=$output/output-$NODE_RANK.log
export ACCESSORY_EXIT_FILE=$output/.exit-$HOSTNAME-$$ # torchrun and srun make other codes of a rank's 75
rm -f "$ACCESSORY_EXIT_FILE"
exec 3> >(exec tee -ia "$log")
tee=$!
set -m # a process group of its own: the terminal's Ctrl-C comes once, through pass
"${command[@]}" </dev/null >&3 2>&1 3>&- &
child=$!
set +m
exec 3>&-
while :; do
    caught='' code=0
    wait "$child" || code=$?
    [[ -n $caught ]] || break
done
for _ in {1..50}; do kill -0 "$tee" 2>/dev/null && sleep 0.1 || break; done
[[ ! -s $ACCESSORY_EXIT_FILE ]] || code=$(<"$ACCESSORY_EXIT_FILE")
rm -f "$ACCESSORY_EXIT_FILE"
if ((code == 75)) && [[ -n ${REQUEUE:-} && -n ${SLURM_JOB_ID:-} ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "${0##*/}: job $SLURM_JOB_ID is not queued again; submit it again" >&2
fi
exit "$code"

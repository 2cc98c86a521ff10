# Sourced by every launch script: the virtual environment, the device, and how a stage is started.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# install FILE: a virtual environment with what FILE lists, made once and again when FILE changes.
install() {
    local venv="$ROOT/.venv" requirements="$ROOT/$1" stamp="$ROOT/.venv/$(basename "$1").installed"
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    export PATH="$venv/bin:$PATH"
    cmp -s "$requirements" "$stamp" && return
    echo "installing $1 into .venv"
    pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
}

# Without a GPU the ranks are processes on the CPU that share its cores.
choose_device() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && return
    export DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + NUM_GPUS - 1) / NUM_GPUS ))}"
}

# The value that follows option $1 in the remaining arguments.
option_value() {
    local name="$1" found=""
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
        "$name") found="${2:-}" ;;
        "$name="*) found="${1#*=}" ;;
        esac
        shift
    done
    printf %s "$found"
}

# run_stage MODULE DEFAULT_OUTPUT OPTIONS...: the DeepSpeed launcher, its log also in output_dir/train.log.
run_stage() {
    local module="$1" output
    output="$(option_value --output_dir "${@:3}")"
    output="${output:-$2}"
    mkdir -p "$output"
    deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} --num_gpus "$NUM_GPUS" --master_port "$MASTER_PORT" \
        --no_local_rank --module "$module" "${@:3}" 2>&1 | tee -a "$output/train.log"
}

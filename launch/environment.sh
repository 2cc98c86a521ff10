# Sourced by every launch script: the virtual environment, the device, and how a stage is started.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTHONSAFEPATH=1  # a folder named `common` where the user stands must not be taken for ours

# install FILE...: a virtual environment with what the files list; again only when they change.
install() {
    local venv="$ROOT/.venv" file
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    export PATH="$venv/bin:$PATH"
    for file in "$@"; do
        cmp -s "$ROOT/$file" "$venv/${file//\//-}.installed" && continue
        echo "installing $file into .venv (once; this takes a few minutes)"
        pip install --quiet --disable-pip-version-check -r "$ROOT/$file"
        cp "$ROOT/$file" "$venv/${file//\//-}.installed"
    done
}

# Without a GPU, ranks are processes that share the cores, and nothing is compiled at run time.
choose_device() {
    nvidia-smi -L >/dev/null 2>&1 && return
    NUM_GPUS="${NUM_GPUS:-1}"
    export DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS))}"
}

# output_dir DEFAULT OPTIONS...: the value of --output_dir among the options.
output_dir() {
    local found="$1" previous="" word
    for word in "${@:2}"; do
        [[ "$previous" == --output[_-]dir ]] && found="$word"
        [[ "$word" == --output[_-]dir=* ]] && found="${word#*=}"
        previous="$word"
    done
    printf %s "$found"
}

# On one machine any free port will do, so that two runs do not collide.
choose_port() {
    [ -n "$MASTER_PORT$HOSTFILE" ] && return
    MASTER_PORT="$(python "$ROOT/launch/free_port.py")"
}

# run_stage MODULE DEFAULT_OUTPUT OPTIONS...: start the ranks in place of this script, whose signals they heed.
run_stage() {
    choose_device
    [[ " $* " == *" --help "* ]] && exec python -m "$1" --help
    choose_port
    exec python "$ROOT/launch/supervise.py" "$(output_dir "${@:2}")" \
        deepspeed --quiet ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} \
        --master_port "${MASTER_PORT:-29500}" --no_local_rank --module "$1" "${@:3}"
}

# step SCRIPT OPTIONS...: run another launch script, and pass on to it the signals that this one gets. To the file
# TIMES, if it is set, comes a line with the seconds and the --output_dir of each. After a signal that came in the
# last step of a run, which then is done, nothing else begins either: 75.
step() {
    local code asked=0 started=$SECONDS
    bash "$@" &
    trap "asked=75; kill -TERM $! 2>/dev/null || true" TERM INT USR1
    while true; do
        wait $! && code=0 || code=$?
        kill -0 $! 2>/dev/null || break # a signal ends `wait` too
    done
    trap - TERM INT USR1
    [ -z "${TIMES:-}" ] || echo "$((SECONDS - started)) $(output_dir "" "${@:2}")" >>"$TIMES"
    [ "$code" != 0 ] || code=$asked
    return "$code"
}

# recipe_options OPTIONS...: what every recipe is told, --model DIR --data DIR --output DIR, as variables.
recipe_options() {
    while [ $# -gt 0 ]; do
        case "$1" in
        --model) MODEL="${2:?--model needs a folder}" ;;
        --data) DATA="${2:?--data needs a folder}" ;;
        --output) OUTPUT="${2:?--output needs a folder}" ;;
        *) echo "error: unknown option $1; allowed: --model --data --output" >&2 && exit 2 ;;
        esac
        shift 2
    done
    : "${MODEL:?--model is required}" "${DATA:?--data is required}" "${OUTPUT:?--output is required}"
}

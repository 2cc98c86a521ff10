# Sourced by every launch script: virtual environment, device, and functions to start a stage.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
HERE="$ROOT/launch"
NUM_GPUS="${NUM_GPUS:-}"        # ranks per machine; empty: all GPUs, or one rank on the CPU
ZERO_CONFIG="${ZERO_CONFIG:-}"  # DeepSpeed JSON; empty: zero2 on GPUs, zero0 on the CPU
HOSTFILE="${HOSTFILE:-}"        # DeepSpeed's list of machines; empty: this one
MASTER_PORT="${MASTER_PORT:-}"  # where the ranks meet; empty: see choose_port, lib/nodes.py and lib/hosts.py
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Blocks that grow leave less memory unusable between phases with tensors of other sizes.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export PYTHONSAFEPATH=1  # a folder `common` in the working directory must not shadow ours

# Handles a signal before a command has started.
stop_early() {
    echo "Stopped during preparation; nothing to save. Run the same command to start again." >&2
    exit 75
}
trap stop_early TERM INT USR1

# install FILE...: install requirements into a virtual environment, again only when they change.
install() {
    local venv="$ROOT/.venv" file
    exec 9<"$ROOT" && flock 9 2>/dev/null || true # nodes with a shared folder start at the same time
    if [ ! -x "$venv/bin/python" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: $(python3 --version) is too old; Triptych needs 3.11 or newer as python3" >&2 && exit 2; }
        python3 -m venv "$venv"
    fi
    export PATH="$venv/bin:$PATH"
    for file in "$@"; do
        cmp -s "$ROOT/$file" "$venv/${file//\//-}.installed" && continue
        echo "installing $file into .venv (once; this takes a few minutes)"
        heed pip install --quiet --disable-pip-version-check -r "$ROOT/$file"
        cp "$ROOT/$file" "$venv/${file//\//-}.installed"
    done
    exec 9<&-
}

has_gpu() {
    [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1
}

# Choose GPUs for the ranks, or the CPU, where nothing is compiled at run time. Ranks share the cores.
choose_device() {
    GPUS=""
    if [ "${DS_ACCELERATOR:-}" = cpu ] || ! has_gpu; then
        NUM_GPUS="${NUM_GPUS:-1}"
        export DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1 CUDA_VISIBLE_DEVICES=
    else
        export NUM_GPUS
        GPUS="$(python "$HERE/lib/gpus.py")" || exit 2
        NUM_GPUS="$(tr , '\n' <<<"$GPUS" | wc -l)"
        unset CUDA_VISIBLE_DEVICES
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS))}"
}

# ranks_on: DeepSpeed's options for the ranks of this machine.
ranks_on() {
    if [ -n "$GPUS" ]; then echo "--include localhost:$GPUS"; else echo "--num_gpus $NUM_GPUS"; fi
}

# output_dir DEFAULT OPTIONS...: the value of --output_dir among the options.
output_dir() {
    local folder="$1" previous="" word
    for word in "${@:2}"; do
        [[ "$previous" == --output[_-]dir ]] && folder="$word"
        [[ "$word" == --output[_-]dir=* ]] && folder="${word#*=}"
        previous="$word"
    done
    printf %s "$folder"
}

# choose_nodes: set NNODES and, on several nodes without HOSTFILE, NODE_RANK, MASTER_ADDR and MASTER_PORT.
choose_nodes() {
    local assignments
    assignments="$(python "$HERE/lib/nodes.py")" || exit 2
    eval "export $assignments"
}

# choose_launcher: DeepSpeed's launcher, which starts the ranks of this node. Its first program, `deepspeed`, takes no
# UUIDs of MIG devices.
choose_launcher() {
    LAUNCHER=(deepspeed --quiet $(ranks_on))
    [[ "$NNODES" = 1 && "$GPUS" != MIG-* ]] && return
    local gpus="${GPUS:-$(seq -s, 0 $((NUM_GPUS - 1)))}"
    LAUNCHER=(python -u -m deepspeed.launcher.launch --quiet --node_rank "${NODE_RANK:-0}"
        --master_addr "${MASTER_ADDR:-127.0.0.1}"
        --world_info "$(python "$HERE/lib/nodes.py" "$NNODES" "$gpus")")
}

# On one machine, use any free port, so that two runs do not collide.
choose_port() {
    [ -n "$MASTER_PORT" ] && return
    MASTER_PORT="$(python "$HERE/lib/free_port.py")"
}

# check_options OPTIONS...: refuse wrong options, or print the help, before any library is loaded.
check_options() {
    heed python -m launch.lib.check_options "$(basename "$0" .sh)" "$@" || exit $?
    [[ " $* " == *" --help "* || " $* " == *" -h "* ]] && exit 0 || true
}

# run_stage MODULE DEFAULT_OUTPUT OPTIONS...: start the ranks, or this script on the machines of HOSTFILE. They replace
# this script and receive its signals.
run_stage() {
    local typed=("${@:3}")
    set -- "$1" "$2" ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "${@:3}"
    install requirements.txt
    check_options "${@:3}"
    choose_nodes
    [ -z "$HOSTFILE" ] || exec python "$HERE/lib/hosts.py" "$(output_dir "${@:2}")" "$0" "${typed[@]}"
    choose_device
    choose_port
    choose_launcher
    exec python "$HERE/lib/supervise.py" "$(output_dir "${@:2}")" "$0" "${LAUNCHER[@]}" \
        --master_port "${MASTER_PORT:-29500}" --no_local_rank --module "$1" "${@:3}"
}

# run_alone MODULE OPTIONS...: replace this script by one process, on the first GPU of CUDA_VISIBLE_DEVICES; without
# one, on all cores.
run_alone() {
    NUM_GPUS=1
    install requirements.txt
    check_options "${@:2}"
    choose_device
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES="$GPUS"
    exec python "$HERE/lib/alone.py" "$@"
}

# heed COMMAND...: run a command and forward the signals of this script to it. Returns 75 also if a signal came too
# late to stop the command, so that the next one does not start.
heed() {
    local code signalled=0
    "$@" &
    trap "signalled=75; kill -TERM $! 2>/dev/null || true" TERM INT USR1
    while true; do
        wait $! && code=0 || code=$?
        kill -0 $! 2>/dev/null || break # a signal ends `wait` too
    done
    trap stop_early TERM INT USR1
    # 128 + the signal: the command had no handler.
    [[ "$signalled" = 0 || "$code" != 0 && "$code" -le 128 ]] || code=$signalled
    return "$code"
}

# step FILE OPTIONS...: run another bash or Python script as a part of this one. The last line names the part that
# failed or was stopped. If TIMES is set, seconds and --output_dir are appended to that file.
step() {
    local code=0 started=$SECONDS interpreter=bash folder
    [[ "$1" == *.py ]] && interpreter=python
    folder="$(output_dir "" "${@:2}")"
    heed "$interpreter" "$@" || code=$?
    [ -z "${TIMES:-}" ] || echo "$((SECONDS - started)) $folder" >>"$TIMES"
    local part="$(basename "$1")${folder:+ ($folder)}"
    case "$code" in
    0) ;;
    75) echo "$(basename "$0"): stopped in $part. Run the same command to resume." >&2 ;;
    *) echo "$(basename "$0"): $part ended with exit code $code" >&2 ;;
    esac
    return "$code"
}

# once FILE SCRIPT OPTIONS...: run a script of this folder, unless the file that it writes last is there.
once() {
    [ -e "$1" ] || step "$HERE/$2" "${@:3}"
}

# check COMMAND OPTIONS... -- COMMAND OPTIONS...: refuse wrong options before the first command starts.
check() {
    heed python -m launch.lib.check_options --later "$@"
}

# script_help OPTIONS...: with --help, show the comment at the top of the script.
script_help() {
    [[ " $* " == *" --help "* || " $* " == *" -h "* ]] || return 0
    sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
    exit 0
}

# require NAME MEANING: refuse to start without an environment variable.
require() {
    [ -n "${!1:-}" ] && return
    echo "error: $(basename "$0") needs the variable $1: $2 (--help shows how)" >&2
    exit 2
}

# allow NAME VALUE...: refuse to start with another value of an environment variable.
allow() {
    [[ -n "${!1:-}" && " ${*:2} " == *" ${!1} "* ]] && return
    echo "error: $(basename "$0"): $1 '${!1:-}' must be one of: ${*:2} (--help shows how)" >&2
    exit 2
}

# recipe_options OPTIONS...: set variables from the options of a recipe, --model DIR --data DIR --output DIR.
recipe_options() {
    script_help "$@"
    export SEED="${SEED:-0}"
    local name
    while [ $# -gt 0 ]; do
        case "$1" in
        --model | --data | --output) ;;
        *) echo "error: unknown option $1; allowed: --model --data --output" >&2 && exit 2 ;;
        esac
        [ -n "${2:-}" ] || { echo "error: $1 needs a folder" >&2 && exit 2; }
        name="${1#--}"
        printf -v "${name^^}" %s "$2"
        shift 2
    done
    for name in model data output; do
        name="${name^^}"
        [ -n "${!name:-}" ] && continue
        echo "error: --${name,,} is required, as in --model DIR --data DIR --output DIR" >&2
        exit 2
    done
}

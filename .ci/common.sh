# What .ci/run and .ci/extra have in common. Both source it in the root of the clone, with `set -euo pipefail`.

export CI=true PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
unset NUMBA_BOUNDSCHECK NUMBA_DISABLE_JIT NUMBA_NUM_THREADS NUMBA_THREADING_LAYER PYTHONPATH PYTEST_ADDOPTS

work=$(mktemp -d)

# Kernels that were compiled in one step are there for the next.
export NUMBA_CACHE_DIR=$work/kernels

new_environment() { # FOLDER [PYTHON]
    "${2:-python3}" -m venv "$1"
    "$1/bin/python" -m pip install -qq --upgrade pip
}

LANE_LIMIT=2700 # seconds for one run of pytest: three times what it takes

pytest_lane() { # LOG [VAR=VALUE...] -- ARGUMENTS...: run pytest and keep what it prints.
    local log=$work/$1 variables=() pytest
    shift
    while [ "$1" != -- ]; do
        variables+=("$1")
        shift
    done
    shift
    : >"$log"
    # What hangs is aborted, whereupon pytest prints where each of its threads was. And there is no pipe to wait
    # for: a process that a test had left behind would hold it open for ever.
    env "${variables[@]}" timeout --signal=ABRT --kill-after=60 "$LANE_LIMIT" pytest --durations=10 "$@" \
        >"$log" 2>&1 &
    pytest=$!
    tail --lines=+1 --follow --pid="$pytest" "$log"
    wait "$pytest"
}

side_by_side() { # COMMAND COMMAND: two lanes at once. What the second one prints comes last.
    local log=$work/$2.out status=0 first second
    # Threads of OpenMP wait asleep: those that spin, as they do by default, take the cores from the other lane
    # (a training of a DLRM then took ten times as long, on 2 cores that others used too).
    local -x OMP_WAIT_POLICY=passive
    # Both in the background: what stands before `||` would go on where a command of it fails.
    "$1" &
    first=$!
    "$2" >"$log" 2>&1 &
    second=$!
    wait "$first" || status=$?
    wait "$second" || status=$?
    cat "$log"
    return "$status"
}

half() { # 0|1 [FILE...]: half of the files of tests, but for the FILEs that are named. The same ones each time.
    # In turn, but not every other one: what belongs together would often be slow together.
    local which=$1 number=0 turns=01101001 file
    shift
    for file in tests/test_*.py; do
        case " $* " in *" $file "*) continue ;; esac
        if [ "${turns:number % 8:1}" -eq "$which" ]; then
            printf '%s\n' "$file"
        fi
        number=$((number + 1))
    done
}

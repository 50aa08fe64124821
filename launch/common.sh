# shellcheck shell=bash
# Sourced by the launchers: how a mistake is told, how a command is shown, what is never put into one.

# fail MESSAGE…: one line for a mistake the user can mend.
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# need TOOL WHERE: the tool is there, or where it comes from.
need() {
    command -v "$1" >/dev/null || fail "$1: not found; $2"
}

# value_of FLAG VALUE…: the value of a flag, when there is one.
value_of() {
    [ $# -ge 2 ] || fail "$1: a value is missing"
    printf '%s' "$2"
}

# quoted WORD…: a command as a shell reads it back.
quoted() {
    local text
    printf -v text '%q ' "$@"
    printf '%s' "${text% }"
}

# act COMMAND…: run it, or show it.
act() {
    if [ -n "${dry_run:-}" ]; then
        # Descriptor 3: also where the answer of a command is read.
        quoted "$@" >&3
        printf '\n' >&3
    else
        "$@" </dev/null
    fi
}

# check_arguments WORD…: what would break a command apart, and what every list of processes would show.
check_arguments() {
    local word number=0
    for word in "$@"; do
        number=$((number + 1))
        case "$word" in
        *$'\n'* | *$'\r'*) fail "argument $number: a line break within it" ;;
        esac
        if [[ "$word" =~ hf_[A-Za-z0-9]{16,} || "$word" =~ ://[^/]*:[^/]*@ ]]; then
            fail "argument $number: a password or token; commands are seen by others, so it has to come by the environment (--help)"
        fi
    done
}

# check_search_r3 COMMAND WORD…: what the search-r3 beside these launchers does not know. It is looked up in the sources,
# since this machine may have nothing installed; values are left to search-r3.
check_search_r3() {
    local sources command="$1" word before='' settings
    sources="$(cd "$(dirname "${BASH_SOURCE[0]}")/../search_r3_jax" 2>/dev/null && pwd)" || return 0
    if ! [[ "$command" =~ ^[a-z]+$ ]] || ! grep -q "subcommand(\"$command\"" "$sources/cli.py"; then
        fail "$command: search-r3 has no such command"
    fi
    shift
    settings="$(settings_of "$sources")"
    for word in "$@"; do
        [ "$before" != --config ] || check_experiment "$sources" "$word"
        case "$word" in
        --) return ;;
        --help | --version) ;;
        --config=*) check_experiment "$sources" "${word#*=}" ;;
        --*) check_option "$sources" "$command" "${word%%=*}" ;;
        esac
        before="$word"
    done
}

# settings_of SOURCES: the path of every setting, as in rl.sampler.top_p, from the fields of the dataclasses.
settings_of() {
    awk '
        function walk(kind, prefix, names, count, i) {
            count = split(fields[kind], names, " ")
            for (i = 1; i <= count; i++) {
                print prefix names[i]
                if ((kind, names[i]) in types && types[kind, names[i]] in fields)
                    walk(types[kind, names[i]], prefix names[i] ".")
            }
        }
        /^[^ ]/ { kind = "" }
        /^class [A-Za-z]+:/ { kind = $2; sub(":", "", kind) }
        kind != "" && /^    [a-z][a-z0-9_]*: / {
            name = $1
            sub(":", "", name)
            fields[kind] = fields[kind] " " name
            types[kind, name] = $2
        }
        END {
            walk("RunConfig", "")
            walk("Cluster", "cluster.")
        }
    ' "$1"/config/*.py "$1/distributed/spec.py"
}

# check_experiment SOURCES NAME: one of search_r3_jax/configs.
check_experiment() {
    local names
    if ! [[ "$2" =~ ^[a-z0-9_]+$ ]] || ! [ -f "$1/configs/$2.py" ]; then
        names="$(cd "$1/configs" && echo [a-z]*.py)"
        names="${names//.py/}"
        fail "--config: $2: no such experiment; there are ${names// /, }"
    fi
}

# check_option SOURCES COMMAND OPTION: a path of `settings` or the field of a command, now or before it was renamed.
check_option() {
    local path="${3#--}" last
    path="${path//-/_}"
    last="${path##*.}"
    # A flag that turns something off.
    last="${last#no_}"
    if [[ "$path" =~ ^[a-z][a-z0-9_.]*$ && "$last" =~ ^[a-z] ]]; then
        case "$path" in
        *.*) ! grep -qxF -e "$path" -e "${path%.*}.$last" <<<"$settings" || return 0 ;;
        *) ! grep -rqE --include='*.py' "^    $last: |name=\"$last\"" "$1/config/run.py" "$1/config/inference.py" \
            "$1/commands" "$1/evaluation/settings.py" || return 0 ;;
        esac
        ! grep -qF "    \"$path\": " "$1/config/reading.py" || return 0
    fi
    fail "$3: search-r3 $2 has no such option; search-r3 $2 --help lists them"
}

# check_name FLAG VALUE: what the cloud takes as a name, so that it is never taken for a flag.
check_name() {
    [[ "$2" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "$1: '$2': small letters, digits and dashes, at most 40"
}

# check_word FLAG VALUE: nothing a shell or a flag could be made of.
check_word() {
    [[ "$2" =~ ^[A-Za-z0-9][A-Za-z0-9._:/@~+-]*$ ]] || fail "$1: '$2': letters, digits and . _ : / @ ~ + - only"
}

# check_count FLAG VALUE: a whole number, 0 or more.
check_count() {
    [[ "$2" =~ ^[0-9]{1,6}$ ]] || fail "$1: '$2': not a whole number"
}

# read_environment FILE: NAME=VALUE a line, taken as they stand; nothing in them is evaluated.
read_environment() {
    local line number=0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        case "$line" in
        '' | '#'*) continue ;;
        esac
        # The line itself may be a secret.
        [[ "$line" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$1, line $number: not NAME=VALUE"
        export "${line?}"
    done <"$1"
}

# value_in FLAG ARGUMENT…: what the arguments of search-r3 give this flag; nothing where they leave it out.
value_in() {
    local flag="$1" word before=''
    shift
    for word in "$@"; do
        case "$before $word" in
        "$flag "*) printf '%s' "$word" ;;
        *" $flag="*) printf '%s' "${word#*=}" ;;
        esac
        before="$word"
    done
}

# add_slice_axis SLICES ARGUMENT…: into `arguments`; training over several slices has an axis of its mesh for them.
add_slice_axis() {
    local slices="$1" given
    shift
    arguments=("$@")
    case "${1:-}" in
    sft | rl) ;;
    *) return ;;
    esac
    given="$(value_in --mesh.slice "$@")"
    if [ -z "$given" ] && [ "$slices" -gt 1 ]; then
        arguments+=(--mesh.slice "$slices")
    elif [ "${given:-"$slices"}" != "$slices" ]; then
        fail "--mesh.slice: $given: it has to be the number of slices, $slices (--slices)"
    fi
}

# check_indexer ARGUMENT…: an indexer follows a run, and its processes are numbered here.
check_indexer() {
    local flag
    [ "${1:-}" = indexer ] || return 0
    for flag in --process --processes --parent; do
        [ -z "$(value_in "$flag" "$@")" ] || fail "$flag: each host of the slices gets its own; leave it out"
    done
    [ -n "$(value_in --run "$@")" ] || fail "--run: missing; the run that the indexer follows"
}

# a_world_of_its_own BOUNDS: this host's chips (2,2,1 are four) become all that JAX sees, though the slice has more hosts.
a_world_of_its_own() {
    local chips=$((${1//,/*}))
    export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS="$1" CLOUD_TPU_TASK_ID=0
    export TPU_PROCESS_ADDRESSES=localhost:8476 TPU_PROCESS_PORT=8476
    export TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost
    TPU_VISIBLE_CHIPS="$(seq -s , 0 $((chips - 1)))"
    export TPU_VISIBLE_CHIPS
}

# wait_for_run FOLDER: until the trainer has made it.
wait_for_run() {
    [ -e "$1/config.json" ] || echo "waiting for $1/config.json, which the trainer writes"
    until [ -e "$1/config.json" ]; do
        sleep 2
    done
}

# pause_before FIRST TRY: seconds until then: FIRST, doubled from try to try, up to five minutes.
pause_before() {
    local seconds="$1" try
    for ((try = 1; try < $2 && seconds < 300; try++)); do
        seconds=$((2 * seconds))
    done
    echo $((seconds < 300 ? seconds : 300))
}

exec 3>&1
